"""What the design asks for, beside what was measured.

In: documents by name, any of which may be missing. Out: one table. A figure that was not measured says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from report_pieces import BENCHES, MISSING, Results, gigabytes, layers_of, table, written

REUSE_BLOCK = 64
"""The prefix cache gives back whole blocks, of at most so many tokens."""


def targets(results: Results) -> str:
    """What was to be reached, beside what was measured."""
    rows = [
        *_export_rows(results.get("full_size")),
        *_load_rows(results),
        *_decode_rows(results),
        *_lookup_rows(results.get("lookup")),
        *_prefill_rows(results),
        *_vision_rows(results),
        *_reuse_rows(results.get("agent_step")),
    ]
    return table(("what", "to reach", "measured", "reached"), rows)


Row = tuple[str, str, str, str]


def _row(what: str, target: str, measured: str | None, reached: bool | None) -> Row:
    verdict = "" if measured is None or reached is None else "yes" if reached else "**no**"
    return what, target, MISSING if measured is None else measured, verdict


def _export_rows(document: Mapping[str, Any] | None) -> list[Row]:
    exported = (document or {}).get("export")
    seconds = memory = None
    if exported:
        seconds, memory = exported["seconds"], exported["peak"]["anon_bytes"]
    what = "export of the 20.6 GB checkpoint to INT4"
    rows = [
        _row(f"{what}: time", "≤ 4 min", written(seconds, "{:.0f} s"), _at_most(seconds, 240)),
        _row(f"{what}: peak anonymous memory", "≤ 0.6 GB", gigabytes(memory), _at_most(memory, 0.6e9)),
    ]
    parts = (document or {}).get("part_bytes")
    text_bytes = parts["decoder"] + parts["embedding"] if parts else None
    # The part for prompts is an option on top, so the target is that of the bundle without it.
    whole = text_bytes + parts["vision"] if parts and text_bytes else None
    rows += [
        _row(
            "INT4 decoder, head and embedding",
            "≤ 6.0 GB",
            gigabytes(text_bytes),
            _at_most(text_bytes, 6.0e9),
        ),
        _row("INT4 bundle with vision", "≤ 6.9 GB", gigabytes(whole), _at_most(whole, 6.9e9)),
    ]
    return rows


def _load_rows(results: Results) -> list[Row]:
    rows = []
    for name, title in BENCHES.items():
        document = results.get(name)
        if document is None and name != "bench-int4":
            continue
        seconds = document["load"]["median_s"] if document else None
        memory = document["memory"]["load"]["anon_bytes"] if document else None
        rows += [
            _row(
                f"load, {title}", "≤ 8 s, aiming at 2 s", written(seconds, "{:.1f} s"), _at_most(seconds, 8)
            ),
            _row(
                f"peak anonymous memory of loading, {title}",
                "≤ 0.5 GB",
                gigabytes(memory),
                _at_most(memory, 0.5e9),
            ),
        ]
    return rows


def _decode_rows(results: Results) -> list[Row]:
    rows = []
    for name, what in (("ours INT4", "INT4 decode"), ("ours INT4 b128", "INT4 decode, blocks of 128")):
        document = _with(results, name)
        step = _engine(document, name).get("step", {})
        ratio, share = step.get("by_reference"), step.get("of_bandwidth")
        reference = (document or {}).get("reference", "llama.cpp Q4_0")
        title = f"{what}, {layers_of(document)}"
        rows += [
            _row(title, f"≥ {reference}", written(ratio, "{:.2f} ×"), _at_least(ratio, 1)),
            _row(
                title,
                "≥ 75 % of weight bytes ÷ read bandwidth",
                written(share, "{:.0%}"),
                _at_least(share, 0.75),
            ),
        ]
    return rows


def _lookup_rows(document: Mapping[str, Any] | None) -> list[Row]:
    runs = (document or {}).get("runs", [])
    measured = ", ".join(f"{run['bundle']} {run['faster_in_all']:.2f} ×" for run in runs) or None
    least = _at_least(max((run["faster_in_all"] for run in runs), default=None), 1.5)
    return [_row("decode with prompt-lookup, recorded answers", "≥ 1.5 ×, same tokens", measured, least)]


def _prefill_rows(results: Results) -> list[Row]:
    rows = []
    for name, what, least in (
        ("ours INT4 + int8", "int8 weights beside the int4 ones", 4),
        ("ours INT4", "the int4 weights alone", 2),
    ):
        document = _with(results, name)
        long = max((int(length) for length in (document or {}).get("prefill", [])), default=1536)
        rate = _engine(document, name).get("prefill", {}).get(str(long), {})
        ratio, share = rate.get("by_reference"), rate.get("of_int8_peak")
        measured = None if ratio is None else f"{ratio:.2f} ×, {share:.0%} of the machine's int8 peak"
        title = f"prefill of {long:,} tokens, {what}, {layers_of(document)}"
        rows.append(_row(title, f"≥ {least} × llama.cpp Q4_0", measured, _at_least(ratio, least)))
    return rows


def _vision_rows(results: Results) -> list[Row]:
    """Growth of anonymous memory per further patch, from picture to larger picture."""
    document = results.get("bench-int4")
    measured = reached = None
    if document and len(document["images"]) > 2:
        points = [
            (row["patches"], document["memory"][f"image of {row['tokens']}"]["anon_bytes"])
            for row in document["images"]
        ]
        if all(value is not None for _, value in points):
            steps = list(pairwise(points))
            slopes = [max(0.0, (more - less) / (high - low)) for (low, less), (high, more) in steps]
            measured = ", ".join(
                f"{slope / 1e3:.0f} kB a patch from {low:,} to {high:,}"
                for slope, ((low, _), (high, _)) in zip(slopes, steps, strict=True)
            )
            # Quadratic memory would cost more for each further patch: here in proportion to the patches.
            reached = slopes[-1] <= max(slopes[0], 1e3) * 1.25
    return [_row("vision attention", "memory linear in patches", measured, reached)]


def _reuse_rows(document: Mapping[str, Any] | None) -> list[Row]:
    measured = reached = None
    steps = [
        step
        for run in (document or {}).get("runs", [])
        if run["warm"]
        for step in run["steps"]
        if step["number"] > 1
    ]
    if steps:
        reused, shared = (sum(step[f"{name}_tokens"] for step in steps) for name in ("reused", "shared"))
        measured = f"{reused:,} of {shared:,} tokens in {len(steps)} steps"
        reached = all(step["shared_tokens"] - step["reused_tokens"] < REUSE_BLOCK for step in steps)
    target = "what a prompt shares with the one before comes from the cache, in blocks"
    return [_row("repeated agent step", target, measured, reached)]


def _at_most(value: float | None, limit: float) -> bool | None:
    return None if value is None else value <= limit


def _at_least(value: float | None, limit: float) -> bool | None:
    return None if value is None else value >= limit


def _with(results: Results, engine: str) -> Mapping[str, Any] | None:
    """The comparison with most layers that has this engine: the head weighs less in it."""
    documents = [results[name] for name in ("compare-40", "compare") if results.get(name)]
    return next((document for document in documents if engine in document["engines"]), None)


def _engine(document: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (document or {}).get("engines", {}).get(name, {})
    return found
