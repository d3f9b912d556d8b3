"""How many megabytes each extra puts on the disk.

Each extra is installed by pip into an empty folder of its own, dependencies included, and the files are added
up (1 MB = 1,000,000 bytes, byte code of the installed modules included). The folder is removed afterwards.
Prints a table; the last line of stdout is one JSON document.

    python benchmarks/install_size.py                                 # all of them
    python benchmarks/install_size.py parity --torch-index https://download.pytorch.org/whl/cpu

torch is pinned to what the tests use; `--torch torch` takes the newest. Whether its build holds CUDA
depends on the index: --torch-index names a further one, and the column `largest` shows what came.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("plain", "export", "server", "ray", "speech", "parity", "optimum")
NEEDS_TORCH = ("speech", "parity", "optimum")
TORCH = "torch==2.13.0"
# What the build reads; a copy keeps its build folders out of the repository.
FILES = ("pyproject.toml", "README.md", "LICENSE")
"""What an installation needs beside the folders that pyproject.toml maps."""


@dataclass(frozen=True)
class Size:
    """One extra, installed.

    Attributes:
        extra: its name, "plain" for none.
        installed_bytes: files of the package and of all that it brings.
        own_bytes: files of this package alone.
        distributions: number of installed distributions, this package included.
        largest: names and bytes of the largest top-level folders.
    """

    extra: str
    installed_bytes: int
    own_bytes: int
    distributions: int
    largest: tuple[tuple[str, int], ...]


def folder_bytes(path: Path) -> int:
    """Sum of the sizes of the regular files below a path."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file() and not item.is_symlink())


def measure(extra: str, source: Path, torch: str, torch_index: str | None) -> Size:
    """Install one extra into a temporary folder and add up its files."""
    requirement = str(source) if extra == "plain" else f"{source}[{extra}]"
    command = [sys.executable, "-m", "pip", "install", "--quiet"]
    with tempfile.TemporaryDirectory(prefix="install-size-") as folder:
        target = Path(folder)
        if extra in NEEDS_TORCH:
            # pip --target does not see what it installed before, so both go into one resolution.
            command += [torch, *(["--extra-index-url", torch_index] if torch_index else [])]
        subprocess.run([*command, "--target", folder, requirement], check=True, stdout=sys.stderr)
        parts = sorted(((folder_bytes(item), item.name) for item in target.iterdir()), reverse=True)
        return Size(
            extra=extra,
            installed_bytes=sum(size for size, _ in parts),
            own_bytes=sum(size for size, name in parts if name.startswith("autoglm_edge")),
            distributions=len(list(target.glob("*.dist-info"))),
            largest=tuple((name, size) for size, name in parts[:5]),
        )


def main() -> None:
    """Measure the extras named on the command line."""
    parser = argparse.ArgumentParser(description="Print how many megabytes each extra puts on the disk.")
    parser.add_argument("extras", nargs="*", help=f"Any of {', '.join(EXTRAS)}; all by default.")
    parser.add_argument("--torch-index", help="Further index to look for torch in, for one without CUDA.")
    parser.add_argument("--torch", default=TORCH, help=f"Requirement for torch; {TORCH} by default.")
    options = parser.parse_args()
    extras = options.extras or list(EXTRAS)
    if unknown := sorted(set(extras) - set(EXTRAS)):
        parser.error(f"unknown extra {unknown[0]!r}, must be one of {', '.join(EXTRAS)}")

    with tempfile.TemporaryDirectory(prefix="install-size-source-") as folder:
        source = Path(folder) / "autoglm-edge"
        source.mkdir()
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        mapped = project["tool"]["setuptools"]["package-dir"].values()
        for name in (*sorted({Path(folder).parts[0] for folder in mapped}), *FILES):
            path = ROOT / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            elif path.is_file():
                shutil.copy(path, source / name)
        sizes = [measure(extra, source, options.torch, options.torch_index) for extra in extras]

    print(f"{'extra':10}{'MB':>8}{'packages':>10}  largest")
    for size in sizes:
        largest = ", ".join(f"{name} {count / 1e6:.0f}" for name, count in size.largest)
        print(f"{size.extra:10}{size.installed_bytes / 1e6:8.0f}{size.distributions:10}  {largest}")
    document = {
        "benchmark": "install_size",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": options.torch,
        "sizes": [asdict(size) for size in sizes],
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
