"""Runs the benchmarks of the 9B and rewrites the tables of docs/benchmarks.md from their JSON.

Everything, which takes hours; some of it; the tables alone:

    python benchmarks/report.py --workspace /tmp/9b --peers-python /tmp/peers/bin/python
    python benchmarks/report.py --workspace /tmp/9b --run compare,agent_step
    python benchmarks/report.py --tables

In: a workspace, in which checkpoint and bundles are made where they are missing. Out:
benchmarks/results/*.json, plots under docs/, and the page. A figure stands on the page if and only if it is
in one of these files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compare import BUNDLES
from report_tables import insert, sections

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
WITHOUT = "without-amx"
"""Folder for the documents of a machine whose processor has no matrix units; only read."""
NAMES = (
    "full_size",
    "bench-int4",
    "bench-int4-b128",
    "bench-int4-prefill",
    "bench-int8",
    "compare",
    "compare-40",
    "agent_step",
    "lookup",
    "serving",
    "soak",
    "native_kernels",
    "native_loss",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, then write the page."""
    options = _parse(arguments)
    if not options.tables:
        for name in options.run:
            print(f"== {name}", file=sys.stderr)
            RUNS[name](options)
    write_page(options.results, options.page, options.plots)
    return 0


def write_page(results: Path, page: Path, plots: Path) -> None:
    """Tables into the page, plots beside it."""
    text = page.read_text(encoding="utf-8")
    page.write_text(insert(text, sections(collect(results), collect(results / WITHOUT))), encoding="utf-8")
    for plot in ("compare.svg", "compare-40.svg", "agent_step.svg"):
        if (results / plot).exists():
            plots.mkdir(parents=True, exist_ok=True)
            shutil.copy(results / plot, plots / plot)


def collect(folder: Path) -> dict[str, Any]:
    """The documents that are there."""
    return {name: read(folder / f"{name}.json") for name in NAMES if (folder / f"{name}.json").exists()}


def read(path: Path) -> Any:
    """A document; of a file with one a line, all of them, later ones over earlier ones."""
    text = path.read_text(encoding="utf-8").strip()
    try:
        return json.loads(text)
    except ValueError:
        merged: dict[str, Any] = {}
        for line in text.splitlines():
            merged |= json.loads(line)
        return merged


def _full_size(options: argparse.Namespace) -> None:
    script = [
        str(HERE / "full_size.py"),
        str(_checkpoint(options)),
        "-o",
        str(_folder(options, "int4")),
        "--keep",
    ]
    (options.results / "full_size.json").write_text(
        _last_line([sys.executable, *script]) + "\n", encoding="utf-8"
    )


def _bench(bundle: str) -> Callable[[argparse.Namespace], None]:
    def run(options: argparse.Namespace) -> None:
        command = [
            sys.executable,
            "-m",
            "autoglm_edge",
            "bench",
            str(_bundle(options, bundle)),
            "--profile",
            "--json",
        ]
        _keep(options, f"bench-{bundle}", command)

    return run


def _compare(options: argparse.Namespace) -> None:
    command = [sys.executable, str(HERE / "compare.py"), "--workspace", str(options.workspace / "compare")]
    command += ["--peers-python", options.peers_python]
    _last_line([*command, "-o", str(options.results / "compare.json")])


WHOLE = ("int4", "int4-b128")
"""Bundles that are compared whole, with the peers of as many bits: all nine would fill 100 GB."""
WHOLE_ENGINES = "=ours INT4,=ours INT4 b128,=llama.cpp Q4_0,genai,OpenVINO"


def _compare_40(options: argparse.Namespace) -> None:
    """The whole model; one length and one round, which takes a quarter of an hour."""
    command = [sys.executable, str(HERE / "compare.py"), "--workspace", str(options.workspace / "compare")]
    command += ["--peers-python", options.peers_python, "--checkpoint", str(_checkpoint(options))]
    for name in WHOLE:
        command += [f"--{name}", str(_bundle(options, name))]
    output = str(options.results / "compare-40.json")
    _last_line([*command, "--only", WHOLE_ENGINES, "--prefill", "1536", "--rounds", "1", "-o", output])


def _agent_step(options: argparse.Namespace) -> None:
    bundles = [str(_bundle(options, name)) for name in ("int4", "int4-prefill", "int8")]
    _last_line(
        [
            sys.executable,
            str(HERE / "agent_step.py"),
            *bundles,
            "-o",
            str(options.results / "agent_step.json"),
        ]
    )


def _lookup(options: argparse.Namespace) -> None:
    bundles = [str(_bundle(options, name)) for name in ("int4", "int8")]
    _last_line(
        [sys.executable, str(HERE / "lookup.py"), *bundles, "-o", str(options.results / "lookup.json")]
    )


def _serving(options: argparse.Namespace) -> None:
    """One request of each client, of a smaller picture: reading them takes a 9B minutes on two cores."""
    script = [sys.executable, str(HERE / "serving.py"), str(_bundle(options, "int4"))]
    script += ["--rounds", "1", "--max-image-tokens", "256", "-o", str(options.results / "serving.json")]
    _last_line(script)


def _soak(options: argparse.Namespace) -> None:
    """Of the embedded model."""
    _keep(options, "soak", [sys.executable, str(ROOT / "scripts" / "soak_server.py")])


def _native_kernels(options: argparse.Namespace) -> None:
    """Where there is AMX; elsewhere the script says that there is none."""
    output = str(options.results / "native_kernels.json")
    _last_line([sys.executable, str(HERE / "native_kernels.py"), "-o", output])


RUNS: dict[str, Callable[[argparse.Namespace], None]] = {
    "full_size": _full_size,
    **{f"bench-{name}": _bench(name) for name in BUNDLES},
    "compare": _compare,
    "compare-40": _compare_40,
    "agent_step": _agent_step,
    "lookup": _lookup,
    "serving": _serving,
    "soak": _soak,
    "native_kernels": _native_kernels,
}


def _checkpoint(options: argparse.Namespace) -> Path:
    """The 9B of random weights, made if it is not there."""
    folder: Path = options.checkpoint or options.workspace / "checkpoint"
    if not (folder / "config.json").exists():
        script = str(ROOT / "scripts" / "make_checkpoint.py")
        _last_line([sys.executable, script, "--shape", "autoglm-9b", "--shards", "4", "-o", str(folder)])
    return folder


def _folder(options: argparse.Namespace, name: str) -> Path:
    given: Path | None = getattr(options, name.replace("-", "_"))
    return given or Path(options.workspace) / name


def _bundle(options: argparse.Namespace, name: str) -> Path:
    """A bundle of it, exported if it is not there."""
    folder = _folder(options, name)
    if not (folder / "manifest.json").exists():
        command = [
            sys.executable,
            "-m",
            "autoglm_edge",
            "export",
            str(_checkpoint(options)),
            "-o",
            str(folder),
        ]
        _last_line([*command, *BUNDLES[name], "--force"])
    return folder


def _keep(options: argparse.Namespace, name: str, command: Sequence[str]) -> None:
    """Run a benchmark and write its document."""
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(_last_line(command) + "\n", encoding="utf-8")


def _last_line(command: Sequence[str]) -> str:
    """Run a step; its stderr goes through.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workspace", type=Path, help="where checkpoint and bundles are made and kept: 60 GB"
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing, rewrite the page")
    parser.add_argument("--run", type=_names, default=tuple(RUNS), help=f"of {','.join(RUNS)} (default all)")
    parser.add_argument("--checkpoint", type=Path, help="this one instead of a new one")
    for name in BUNDLES:
        parser.add_argument(
            f"--{name}", type=Path, metavar="OUT", help=f"this bundle instead of WORKSPACE/{name}"
        )
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    options = parser.parse_args(arguments)
    if not options.tables and options.workspace is None:
        parser.error("name a --workspace, or rewrite the --tables alone")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in RUNS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(RUNS)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
