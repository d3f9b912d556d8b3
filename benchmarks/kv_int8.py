"""A KV cache of 8-bit integers against one of floats: time of a step, of a prompt's piece, and memory.

    python benchmarks/kv_int8.py [--layers 2] [--contexts 1024 4096 16384]

Layers of the 9B's shape with random weights, a head of next to nothing, int4. The cache is filled with random
rows up to a context; then one token is decoded, eight are verified (as a draft is), and a piece of a prompt
of 512 is read, by the decoder and, where this CPU has exact products of bytes, layer by layer. The two caches
take turns in one process, so that a busy machine is busy for both; memory is measured in a process for each.
Times are per layer, of 40 in the model. Prints Markdown tables; the last line is the JSON document.
benchmarks/kv_loss.py has the loss.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from make_checkpoint import SHAPES, make_checkpoint

from autoglm_edge.export.pipeline import export
from autoglm_edge.measure.figures import Times, repeat, rounded
from autoglm_edge.measure.machine import this_machine
from autoglm_edge.measure.memory import MemorySampler, read_memory
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.cache import KVCache
from autoglm_edge.runtime.machine.integers import integers
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

KINDS = ("float", "int8")
DRAFT, PIECE = 8, 512
WORK = ("decode", "verify 8", "prompt, decoder", "prompt, layers")


def main() -> None:
    """Export twice, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--threads", type=int, default=0, help="default: one per core")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "results" / "kv_int8.json"
    )
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, arguments.contexts[0], arguments.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        bundles = make_bundles(Path(temporary), arguments.layers)
        times = {str(context): rows for context, rows in times_of(bundles, arguments).items()}
        memory = {
            str(context): {kind: in_child(bundle, context, arguments) for kind, bundle in bundles.items()}
            for context in arguments.contexts
        }
    print_tables(times, memory)
    document = {
        "date": str(date.today()),
        "machine": this_machine().to_json(),
        "onnxruntime": onnxruntime.__version__,
        "layers": arguments.layers,
        "ms_per_layer": times,
        "memory": memory,
    }
    text = json.dumps(rounded(document, 5))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def make_bundles(folder: Path, layers: int) -> dict[str, Path]:
    """A bundle for each kind of cache, of one checkpoint."""
    shape = replace(
        SHAPES["autoglm-9b"],
        layers=layers,
        vocab=1024,
        used_vocab=1000,
        vision_hidden=64,
        vision_depth=1,
        vision_heads=2,
        merger_intermediate=128,
    )
    make_checkpoint(folder / "checkpoint", shape)
    bundles = {kind: folder / kind for kind in KINDS}
    for kind, bundle in bundles.items():
        export(folder / "checkpoint", bundle, precision="int4", kv=kind, max_image_tokens=16)  # type: ignore[arg-type]
    return bundles


def open_models(bundle: Path, threads: int) -> dict[str, Model]:
    """A bundle in each way of reading prompts."""
    ways = ["decoder", "layers"] if integers().exact else ["decoder"]
    opened = Bundle.open(bundle)
    return {
        way: Model(opened, SessionOptions(threads=threads, weights="packed", prefill=way))  # type: ignore[arg-type]
        for way in ways
    }


def times_of(bundles: dict[str, Path], arguments: argparse.Namespace) -> dict[int, Any]:
    """Medians of all work, by context, name and kind of cache."""
    models = {kind: open_models(bundle, arguments.threads) for kind, bundle in bundles.items()}
    found: dict[int, Any] = {}
    for context in arguments.contexts:
        found[context] = {name: {} for name in WORK if name != WORK[3] or "layers" in models["float"]}
        work = {}
        for kind, own in models.items():
            cache = own["decoder"].new_cache(context + PIECE)
            fill(cache, context)
            work[kind] = works(own, cache)
        for index, name in enumerate(found[context]):
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for turn in range(arguments.repeats + 1):
                for kind in KINDS:
                    once = repeat(work[kind][index], 1).median_s
                    if turn:  # the first time pays for new memory
                        seconds[kind].append(once)
            for kind, values in seconds.items():
                times = Times(tuple(value / arguments.layers for value in values))
                found[context][name][kind] = {"median": 1000 * times.median_s, "spread": times.spread}
    return found


def in_child(bundle: Path, context: int, arguments: argparse.Namespace) -> Any:
    """Memory of one cache, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", str(bundle), "--contexts", str(context)]
    command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(bundle: Path, context: int, threads: int) -> dict[str, int | None]:
    """Bytes of a filled cache, and what a step and a prompt need beside it at most."""
    models = open_models(bundle, threads)
    before = read_memory().anon_bytes
    cache = models["decoder"].new_cache(context + PIECE)
    fill(cache, context)
    after = read_memory().anon_bytes
    found: dict[str, int | None] = {
        "per_token_bytes": models["decoder"].bundle.manifest.kv_bytes_per_token,
        "cache_bytes": None if before is None or after is None else after - before,
    }
    with MemorySampler(interval=0.002) as memory:
        for name, work in zip(WORK, works(models, cache), strict=False):
            with memory.phase(name):
                work()
            peak = memory.peaks[name].anon_bytes
            found[name] = None if peak is None or after is None else max(0, peak - after)
    return found


def works(models: dict[str, Model], cache: KVCache) -> list[Callable[[], object]]:
    """What is timed, in the order of WORK; each leaves the cache as it was."""
    decoder, context = models["decoder"], cache.length

    def scored(tokens: int) -> None:
        positions = np.arange(context, context + tokens)[None].repeat(3, 0)
        decoder.forward(decoder.embed(np.full(tokens, 5)), positions, cache, tokens)
        cache.truncate(context)

    def read(model: Model) -> None:
        positions = np.arange(context, context + PIECE)[None].repeat(3, 0)
        model.prefill(model.embed(np.full(PIECE, 5)), positions, cache)
        cache.truncate(context)

    found: list[Callable[[], object]] = [lambda: scored(1), lambda: scored(DRAFT), lambda: read(decoder)]
    if "layers" in models:
        found.append(lambda: read(models["layers"]))
    return found


def fill(cache: KVCache, tokens: int) -> None:
    """Random rows of usual size."""
    rng = np.random.default_rng(0)
    shape = (*cache.row_shape[:3], tokens, cache.row_shape[4])
    if cache.dtype == np.int8:
        cache.write(0, rng.integers(-60, 61, shape, dtype=np.int8))
    else:
        cache.write(0, rng.standard_normal(shape, np.float32))


def print_tables(times: dict[str, Any], memory: dict[str, Any]) -> None:
    """Times side by side, then memory."""
    print("| context | | float, ms per layer | int8, ms per layer | int8 to float |")
    print("|---:|---|---:|---:|---:|")
    for context, rows in times.items():
        for name, row in rows.items():
            one, other = (row[kind]["median"] for kind in KINDS)
            print(f"| {int(context):,} | {name} | {one:.2f} | {other:.2f} | {other / one:.2f} |")
    print("\n| context | cache, float | cache, int8 | beside it, reading a prompt: float | int8 |")
    print("|---:|---:|---:|---:|---:|")
    for context, row in memory.items():
        cells = [row[kind][what] for what in ("cache_bytes", WORK[2]) for kind in KINDS]
        print(f"| {int(context):,} | " + " | ".join(megabytes(cell) for cell in cells) + " |")


def megabytes(count: int | None) -> str:
    """For a table."""
    return "?" if count is None else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
