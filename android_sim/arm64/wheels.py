"""Fetches aarch64 wheels of the packages that the runtime imports, in the versions that this Python has.

In: a folder. Out: wheels in it. pip does it, with the index and the mirror that it is set up for; it checks
each wheel against the digest of the index. Knows nothing of what they are for.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.machine.prepared import Tell

PYTHON = "3.11"
"""Of Debian bookworm."""
PACKAGES = ("onnxruntime", "numpy", "tokenizers", "jinja2", "MarkupSafe", "pillow")
"""What the runtime imports, and what those import. A light list: pip's own would bring an HTTP client."""
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
"""glibc of bookworm is 2.36; a wheel names the oldest that it runs with."""
_TIMEOUT_SECONDS = 1800


def versions(onnxruntime: str | None = None) -> dict[str, str]:
    """Versions that are installed here, by package.

    Args:
        onnxruntime: another version of that one.

    Raises:
        SimulationError: one is not installed.
    """
    try:
        found = {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as error:
        raise SimulationError(f"the package {error.name} is not installed; reinstall autoglm-edge") from error
    return found if onnxruntime is None else found | {"onnxruntime": onnxruntime}


def fetch_wheels(wanted: dict[str, str], folder: Path, tell: Tell) -> list[Path]:
    """Fetch wheels, one package at a time, those that are there not again.

    Args:
        wanted: versions by package.
        folder: where they go.
        tell: told what is fetched.

    Raises:
        SimulationError: pip is missing, or cannot get one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SimulationError(
            f"{folder} cannot be made ({error.strerror}); set AUTOGLM_EDGE_CACHE"
        ) from error
    return [_fetch(name, version, folder, tell) for name, version in wanted.items()]


def _fetch(name: str, version: str, folder: Path, tell: Tell) -> Path:
    if found := _wheel(name, version, folder):
        return found
    tell.say(f"Fetching {name} {version} for aarch64")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
        "download",
        "--quiet",
    ]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in _PLATFORMS:
        command += ["--platform", platform]
    command += ["--dest", str(folder), f"{name}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SimulationError(f"pip cannot fetch {name} {version} ({error}); try again") from error
    wheel = _wheel(name, version, folder)
    if done.returncode != 0 or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            line for line in done.stderr.splitlines() if line.strip()
        ]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"it exits with {done.returncode}"
        raise SimulationError(
            f"pip cannot fetch {name} {version} for aarch64 and Python {PYTHON} ({reason[:200]}); connect to "
            "the network, or install versions that have such wheels"
        )
    return wheel


def _wheel(name: str, version: str, folder: Path) -> Path | None:
    """The wheel of a package in a folder."""
    start = f"{name}-{version}-".lower().replace("_", "-")
    for path in sorted(folder.glob("*.whl")):
        label = path.name.lower()
        if label.replace("_", "-").startswith(start) and (
            label.endswith("aarch64.whl") or label.endswith("-any.whl")
        ):
            return path
    return None
