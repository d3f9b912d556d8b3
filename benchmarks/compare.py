"""Identical 9B shapes through this runtime and its peers, in one run, beside what the machine can do.

    python -m venv /tmp/peers && /tmp/peers/bin/pip install gguf onnxruntime-genai openvino
    CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    python benchmarks/compare.py --workspace /tmp/compare --peers-python /tmp/peers/bin/python

Each engine runs in a process of its own with the same number of threads; rounds alternate between engines,
the machine's limits are measured at both ends of each round, and medians count. Weights are random and no
two layers are alike: times and bytes are those of a real model. An engine that is not installed, fails or
crashes stands in the table as such. A table goes to stdout; the last line is one JSON document, which is also
written to benchmarks/results/, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import peer_gguf
from compare_models import Model, Models, layer_weights
from compare_plot import panels, plot
from compare_report import markdown, summarize
from peer_job import Job

from autoglm_edge.measure.bandwidth import measure_limits
from autoglm_edge.measure.figures import rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.runtime.machine.topology import usable_cores

HERE = Path(__file__).resolve().parent
REFERENCE = "llama.cpp Q4_0"
TIMEOUT_SECONDS = 3600
BUNDLES = {
    "int4": ("--int4",),
    "int4-b128": ("--int4", "--block-size", "128"),
    "int4-prefill": ("--int4", "--prefill", "int8"),
    "int8": ("--int8",),
}
"""Options of `autoglm export` that make ours."""


@dataclass(frozen=True)
class Engine:
    """A line of the table.

    Attributes:
        name: in it; ours begin with "ours".
        worker: script that measures it.
        python: interpreter that has it.
        model: makes what it loads.
        prompts: what is to read them; only ours take another word than "auto".
    """

    name: str
    worker: str
    python: str
    model: Callable[[], Model]
    prompts: str = "auto"


def engines(models: Models, peers_python: str, torch_python: str) -> list[Engine]:
    """All that are compared; ours first."""
    here = sys.executable

    ours = {name: partial(models.bundle, name, *given) for name, given in BUNDLES.items()}
    int4 = ours["int4"]
    names = (
        ("ours INT4", "int4", "auto"),
        ("ours INT4 by graphs", "int4", "layers"),
        ("ours INT4 b128", "int4-b128", "auto"),
        ("ours INT4 + int8", "int4-prefill", "integer"),
        ("ours INT8", "int8", "auto"),
    )
    found = [Engine(name, "peer_ours.py", here, ours[model], prompts) for name, model, prompts in names]
    for form in peer_gguf.FORMATS:
        gguf = partial(models.gguf, form)
        found.append(Engine(f"llama.cpp {form.upper()}", "peer_llama.py", peers_python, gguf))
    return [
        *found,
        Engine("onnxruntime-genai INT4", "peer_genai.py", peers_python, int4),
        Engine("OpenVINO INT4", "peer_openvino.py", peers_python, int4),
        Engine("transformers bf16", "peer_transformers.py", torch_python, models.original),
    ]


def run(
    engine: Engine, job: Job, timeout: float = TIMEOUT_SECONDS, cache: Path | None = None
) -> dict[str, Any]:
    """Measure one engine in a process; what goes wrong is in the report.

    Args:
        engine: which.
        job: what it is to do.
        timeout: in seconds.
        cache: folder for weights that our runtime prepares; default the user's.
    """
    environment = {**os.environ, **({"AUTOGLM_EDGE_CACHE": str(cache)} if cache else {})}
    command = [engine.python, str(HERE / engine.worker), json.dumps(asdict(job))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    except OSError as error:
        return {"error": f"{engine.python} cannot be started: {error.strerror or error}"}
    lines = done.stdout.strip().splitlines()
    if done.returncode < 0:
        return {"error": f"ended by {signal.Signals(-done.returncode).name}"}
    try:
        report = json.loads(lines[-1])
        if isinstance(report, dict):
            return report
    except (IndexError, ValueError):
        pass
    said = done.stderr.strip().splitlines()
    return {"error": said[-1][:300] if said else f"ended with {done.returncode} and said nothing"}


BF16 = """
import json, sys, time, torch
threads, rows, side = map(int, sys.argv[1:])
torch.set_num_threads(threads)
a, b = torch.randn(rows, side).bfloat16(), torch.randn(side, side).bfloat16()
best = 1e9
for _ in range(6):
    started = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - started)
print(json.dumps(2 * rows * side * side / best))
"""


def bf16_peak(torch_python: str, threads: int) -> float | None:
    """Operations per second of a bfloat16 product in torch; None without torch."""
    command = [torch_python, "-c", BF16, str(threads), "512", "4096"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        return float(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the models, run the rounds, write the report."""
    options = _parse(arguments)
    options.workspace.mkdir(parents=True, exist_ok=True)
    paths = {name: getattr(options, name.replace("-", "_")) for name in BUNDLES}
    given = {name: path for name, path in paths.items() if path is not None}
    if options.checkpoint is None:
        models = Models.of_layers(options.workspace, options.layers, options.peers_python, given)
    else:
        models = Models(options.workspace, options.checkpoint, options.peers_python, given)
    chosen = [
        engine
        for engine in engines(models, options.peers_python, options.torch_python)
        if not options.only or any(_names(word, engine.name) for word in options.only)
    ]
    prepared: dict[str, Model] = {}
    failed: dict[str, dict[str, Any]] = {}
    for engine in chosen:
        try:
            prepared[engine.name] = engine.model()
        except (SystemExit, OSError) as error:
            failed[engine.name] = {"error": f"its model cannot be made: {error}"}
    for engine in chosen:
        if engine.worker == "peer_ours.py" and engine.name not in failed:
            # The first load prepares weights for this machine; rounds are to see the loads after it.
            print(f"preparing: {engine.name}", file=sys.stderr)
            first = Job(str(prepared[engine.name].path), options.threads, models.geometry, (), 0, 1)
            _tell(run(engine, first, cache=options.workspace / "cache"))
    rounds, limits = [], []
    for number in range(options.rounds):
        before = measure_limits(options.threads).to_json()
        found = dict(failed)
        for engine in chosen:
            if engine.name in failed:
                continue
            print(f"round {number + 1} of {options.rounds}: {engine.name}", file=sys.stderr)
            job = Job(
                model=str(prepared[engine.name].path),
                threads=options.threads,
                geometry=models.geometry,
                prefill=options.prefill,
                decode_at=options.decode_at,
                decode_steps=options.steps,
                prompts=engine.prompts,
            )
            found[engine.name] = run(engine, job, cache=options.workspace / "cache")
            _tell(found[engine.name])
        rounds.append({engine.name: found[engine.name] for engine in chosen})
        after = measure_limits(options.threads).to_json()
        # A limit is what is possible, and on a shared machine both probes may have met a busy moment.
        limits.append({key: max(before[key], after[key]) for key in before})
    document = build_document(options, models, prepared, rounds, limits)
    document["limits"]["bf16_ops_per_s"] = bf16_peak(options.torch_python, options.threads)
    write(without(document, options.workspace), options.output)
    return 0


def build_document(
    options: argparse.Namespace,
    models: Models,
    prepared: dict[str, Model],
    rounds: list[dict[str, dict[str, Any]]],
    limits: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that was found, and how."""
    geometry = models.geometry
    counts = {
        name: {"weights": model.weights, "read_bytes": model.read_bytes} for name, model in prepared.items()
    }
    names = [*rounds[0]]
    reference = REFERENCE if REFERENCE in names else names[0]
    return {
        "date": date.today().isoformat(),
        "machine": this_machine().to_json(),
        "threads": options.threads,
        "geometry": geometry,
        "layer_weights": layer_weights(geometry),
        "prefill": list(options.prefill),
        "decode_at": options.decode_at,
        "rounds": options.rounds,
        "reference": reference,
        "limits": {key: statistics.median(limit[key] for limit in limits) for key in limits[0]},
        "engines": summarize(rounds, limits, counts, layer_weights(geometry), reference),
    }


def without(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A document that does not tell where on this machine it was made."""
    found: dict[str, Any] = json.loads(json.dumps(document).replace(str(folder), "WORKSPACE"))
    return found


def write(document: dict[str, Any], output: Path) -> None:
    """JSON and plot into files, table and JSON to stdout."""
    document = rounded(document)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    machine = document["machine"]
    caption = (
        f"{document['geometry']['layers']} layers and head of the 9B shape, {machine['processor']}, "
        f"{document['threads']} threads, {document['date']}"
    )
    picture = plot([*document["engines"]], panels(document), caption)
    output.with_suffix(".svg").write_text(picture + "\n", encoding="utf-8")
    print(markdown(document))
    limits = document["limits"]
    print(
        f"\nlimits: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, int8 "
        f"{limits['int8_ops_per_s'] / 1e12:.2f} TOPS, fp32 {limits['fp32_ops_per_s'] / 1e12:.2f}, bf16 "
        + (f"{limits['bf16_ops_per_s'] / 1e12:.2f}" if limits["bf16_ops_per_s"] else "not measured")
    )
    print(json.dumps(document, ensure_ascii=False))


def _tell(report: dict[str, Any]) -> None:
    if "error" in report:
        print(f"  failed: {report['error']}", file=sys.stderr)
        return
    prefill = ", ".join(f"{min(times):.2f} s" for times in report["prefill_s"].values())
    step = statistics.median(report["step_s"])
    print(f"  prefill {prefill}; step {1e3 * step:.1f} ms", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, required=True, help="where models are made and kept")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers; the 9B has 40 (default 4)")
    parser.add_argument("--checkpoint", type=Path, help="this one, with the layers it has")
    for name in BUNDLES:
        parser.add_argument(f"--{name}", type=Path, metavar="OUT", help="this bundle of the checkpoint")
    parser.add_argument("--prefill", type=_sizes, default=(512, 1536), help="default 512,1536")
    parser.add_argument("--decode-at", type=int, default=64, help="tokens before the first step (default 64)")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter that has transformers")
    parser.add_argument("--only", type=_words, default=[], help="words of engines' names, or =NAME")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "compare.json")
    return parser.parse_args(arguments)


def _names(word: str, engine: str) -> bool:
    """Whether a word of --only means an engine: it is in its name, or begins with = and is the name."""
    word, name = word.lower(), engine.lower()
    return word[1:] == name if word.startswith("=") else word in name


def _words(text: str) -> list[str]:
    return text.split(",")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
