# Sourced by quickstart and test: finds a Python, makes the virtual environment, installs the project into it once.
#
# Reads: AUTOGLM_VENV    folder of the environment (default: .venv in the repository)
#        PYTHON          interpreter to make it with (default: the first of python3.11 ... python3 that is new enough)
#        PIP_TORCH_INDEX index that torch is taken from; "default" means pip's own. Without it, on Linux with an
#                        unchanged pip, the CPU index of pytorch.org: PyPI's torch brings gigabytes of CUDA.
# Gives: VENV_PYTHON     the environment's interpreter; its folder is put in front of PATH.

VENV=${AUTOGLM_VENV:-$ROOT/.venv}
VENV_PYTHON=$VENV/bin/python
TORCH_REQUIREMENT='torch==2.13.*'
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  local found
  found=$(python3 --version 2>/dev/null || true)
  fail "Python 3.11 or newer is needed, found ${found:-none}; install one, or name it: PYTHON=/path/to/python $0"
}

make_venv() {
  if [ -e "$VENV" ] && ! "$VENV_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    fail "$VENV is no working environment of Python 3.11 or newer; remove it, or set AUTOGLM_VENV to another folder"
  fi
  if [ ! -e "$VENV" ]; then
    local python
    python=$(find_python)
    say "making $VENV with $("$python" --version 2>&1)"
    "$python" -m venv "$VENV" || {
      rm -rf "$VENV"
      fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
    }
  fi
  PATH=$VENV/bin:$PATH
}

# What an installation depends on: the project's metadata, what is compiled, where it lies, the interpreter.
fingerprint() {
  (cd "$ROOT" && "$VENV_PYTHON" - <<'PYTHON_END'
import hashlib, os, pathlib, sys
files = [pathlib.Path("pyproject.toml"), *sorted(pathlib.Path("runtime").rglob("*.[ch]"))]
parts = (*(file.read_bytes() for file in files), os.getcwd().encode(), sys.version.encode())
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON_END
  )
}

is_installed() { [ -f "$VENV/.installed-$1" ] && [ "$(cat "$VENV/.installed-$1")" = "$(fingerprint)" ]; }

pip_install() {
  "$VENV_PYTHON" -m pip install --quiet "$@" || fail "pip could not install $*; its message above says why (no network?)"
}

install_torch() {
  local index=${PIP_TORCH_INDEX:-}
  if [ -z "$index" ]; then
    index=default
    if [ "$(uname -s)" = Linux ] && [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ] &&
      ! "$VENV_PYTHON" -m pip config list 2>/dev/null | grep -qE 'index|find-links'; then
      index=https://download.pytorch.org/whl/cpu
    fi
  fi
  if [ "$index" = default ]; then
    pip_install "$TORCH_REQUIREMENT"
  else
    pip_install "$TORCH_REQUIREMENT" --index-url "$index"
  fi
}

# install_project EXTRA: editable, once per change of pyproject.toml. [dev] holds all of [export] and [server].
install_project() {
  local extra=$1
  if is_installed "$extra"; then return; fi
  case $extra in export | server) if is_installed dev; then return; fi ;; esac
  say "installing autoglm-edge[$extra] into $VENV"
  if [ "$extra" = dev ]; then
    "$VENV_PYTHON" -c 'import torch' 2>/dev/null || install_torch
  fi
  pip_install --editable "$ROOT[$extra]"
  fingerprint >"$VENV/.installed-$extra"
}
