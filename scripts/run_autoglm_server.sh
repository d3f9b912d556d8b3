#!/usr/bin/env bash
# Starts the server on port 8000: a bundle and the flags of `autoglm serve`. Without a bundle it exports the
# embedded pocket model first, so that there is something to try clients on.
# usage: scripts/run_autoglm_server.sh [OUT] [--host ADDRESS] [--port N] [any other flag of autoglm serve]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/scripts/venv.sh"
make_venv

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  BUNDLE=$ROOT/out/pocket-int4
  if [ ! -f "$BUNDLE/manifest.json" ]; then
    install_project export
    mkdir -p "$ROOT/out"
    "$VENV_PYTHON" -m autoglm_edge export --int4 -o "$BUNDLE"
  fi
else
  BUNDLE=$1
  shift
fi
install_project server
# A --port in the arguments comes later, and the last one counts. exec: signals reach the server itself.
exec "$VENV_PYTHON" -m autoglm_edge serve "$BUNDLE" --port 8000 "$@"
