"""Tables of docs/benchmarks.md, from the documents that the benchmarks wrote.

In: documents by name, any of which may be missing. Out: Markdown by section. A figure that was not measured
says so; nothing is filled in by hand. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from agent_step import table as agent_table
from compare_report import markdown as compare_table
from lookup import table as lookup_table
from serving import table as serving_table

Results = Mapping[str, Any]
"""Documents by the name of their file, without its ending."""

BENCHES = {
    "bench-int4": "INT4",
    "bench-int4-b128": "INT4, blocks of 128",
    "bench-int4-prefill": "INT4 + int8 prefill",
    "bench-int8": "INT8",
}
MISSING = "not measured"
REUSE_BLOCK = 64
"""The prefix cache gives back whole blocks, of at most so many tokens."""


def sections(results: Results) -> dict[str, str]:
    """Every section by the name of its markers."""
    return {
        "targets": targets(results),
        "full-size": full_size(results),
        "bench": benches(results),
        "profile": profiles(results),
        "compare": compared(results),
        "agent": agent(results),
        "lookup": lookup(results),
        "serving": serving(results),
        "soak": soak(results),
    }


def insert(page: str, parts: Mapping[str, str]) -> str:
    """The page with the text between `<!-- begin NAME -->` and `<!-- end NAME -->` replaced.

    Raises:
        ValueError: a pair of markers is missing or in the wrong order.
    """
    for name, text in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
            raise ValueError(f"the page must have the markers {begin} and {end} once, in this order")
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


# --- the targets of the design


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
    return _table(("what", "to reach", "measured", "reached"), rows)


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
        _row(f"{what}: time", "≤ 4 min", _text(seconds, "{:.0f} s"), _at_most(seconds, 240)),
        _row(f"{what}: peak anonymous memory", "≤ 0.6 GB", _gigabytes(memory), _at_most(memory, 0.6e9)),
    ]
    parts = (document or {}).get("part_bytes")
    text_bytes = parts["decoder"] + parts["embedding"] if parts else None
    # The part for prompts is an option on top, so the target is that of the bundle without it.
    whole = text_bytes + parts["vision"] if parts and text_bytes else None
    rows += [
        _row(
            "INT4 decoder, head and embedding",
            "≤ 6.0 GB",
            _gigabytes(text_bytes),
            _at_most(text_bytes, 6.0e9),
        ),
        _row("INT4 bundle with vision", "≤ 6.9 GB", _gigabytes(whole), _at_most(whole, 6.9e9)),
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
            _row(f"load, {title}", "≤ 8 s, aiming at 2 s", _text(seconds, "{:.1f} s"), _at_most(seconds, 8)),
            _row(
                f"peak anonymous memory of loading, {title}",
                "≤ 0.5 GB",
                _gigabytes(memory),
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
        title = f"{what}, {_layers(document)}"
        rows += [
            _row(title, f"≥ {reference}", _text(ratio, "{:.2f} ×"), _at_least(ratio, 1)),
            _row(
                title,
                "≥ 75 % of weight bytes ÷ read bandwidth",
                _text(share, "{:.0%}"),
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
        title = f"prefill of {long:,} tokens, {what}, {_layers(document)}"
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


# --- the other tables


def full_size(results: Results) -> str:
    """Export, load and one answer of the 9B."""
    document = results.get("full_size")
    if document is None:
        return MISSING
    run, parts = document["run"], document["part_bytes"]
    timings, usage = run["timings"], run["usage"]
    rows: list[tuple[str, ...]] = []
    if "export" in document:
        rows += [
            ("export, wall time", f"{document['export']['seconds']:.0f} s"),
            ("export, peak anonymous memory", str(_gigabytes(document["export"]["peak"]["anon_bytes"]))),
        ]
    pieces = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    rows.append(("bundle", f"{document['bundle_bytes'] / 1e9:.2f} GB: {pieces}"))
    if "prepare" in document:
        rows.append(("preparing weights, once per machine", f"{document['prepare']['seconds']:.0f} s"))
    rows += [
        ("load, files in the page cache as far as they fit", f"{document['load']['seconds']:.1f} s"),
        ("memory while loading", _memory(document["load"]["peak"])),
        ("prompt", f"{usage['prompt_tokens']} tokens, {usage['image_tokens']} of the image"),
        ("image encoding", f"{timings['image_ms'] / 1e3:.1f} s"),
        ("prefill", f"{timings['prefill_tokens_per_s']:.1f} tokens/s"),
        ("time to first token", f"{timings['ttft_ms'] / 1e3:.1f} s"),
        ("decode", f"{timings['decode_tokens_per_s']:.2f} tokens/s"),
        ("peak memory of the run", _memory(run["peak"])),
        ("rate at which decode reads the decoder's weights", f"{document['decode_read_gb_per_s']:.1f} GB/s"),
        ("read bandwidth of the machine, same run", f"{document['read_bandwidth_gb_per_s']:.1f} GB/s"),
    ]
    return f"{_where(document)}\n\n" + _table((document["precision"].upper(), ""), rows)


def benches(results: Results) -> str:
    """`autoglm bench` of each bundle, side by side."""
    found = {title: results[name] for name, title in BENCHES.items() if results.get(name)}
    if not found:
        return MISSING
    rows: list[tuple[str, ...]] = []
    documents = list(found.values())

    def add(title: str, cells: Sequence[str]) -> None:
        rows.append((title, *cells))

    add("load", [_rate(item["load"]) for item in documents])
    for key, name, unit in (
        ("prefill", "tokens", "prefill of {:,} tokens"),
        ("decode", "context", "decode at {:,}"),
        ("together", "answers", "decode at 1,024, {} answers at once"),
    ):
        for size in sorted({row[name] for item in documents for row in item.get(key, ())}):
            cells = []
            for item in documents:
                row = next((row for row in item.get(key, ()) if row[name] == size), None)
                cells.append("" if row is None else f"{row['tokens_per_s']:.2f} tokens/s{_share(row)}")
            add(unit.format(size), cells)
    for tokens in sorted({row["tokens"] for item in documents for row in item["images"]}):
        cells = [
            next((_rate(row) for row in item["images"] if row["tokens"] == tokens), "") for item in documents
        ]
        add(f"screenshot of {tokens:,} tokens", cells)
    for phase in ("load", "steady"):
        add(f"memory, {phase}", [_memory(item["memory"].get(phase, {})) for item in documents])
    chosen = "; ".join(
        f"{title}: prompts by {choices.get('prefill', '?')}, weights {choices.get('weights', '?')}"
        for title, choices in ((title, item["choices"]) for title, item in found.items())
    )
    return f"{_where(documents[0])} {chosen}.\n\n" + _table(("", *found), rows)


def profiles(results: Results) -> str:
    """Which operators take the time, for each bundle that was traced."""
    rows = [
        (title, profile["name"], f"{profile['seconds']:.2f}", _shares(profile["shares"]))
        for name, title in BENCHES.items()
        for profile in results.get(name, {}).get("profiles", ())
    ]
    return _table(("bundle", "work", "traced, s", "operators"), rows) if rows else MISSING


def _shares(shares: Mapping[str, float]) -> str:
    seen = sorted(((share, name) for name, share in shares.items() if share >= 0.02), reverse=True)
    return ", ".join(f"{name} {share:.0%}" for share, name in seen)


def compared(results: Results) -> str:
    """Ours and the peers: a part of the model, and where it was measured the whole."""
    found = [results[name] for name in ("compare", "compare-40") if results.get(name)]
    return "\n\n".join(_compared(document) for document in found) or MISSING


def _compared(document: Mapping[str, Any]) -> str:
    limits = document["limits"]
    names = (("int8", "int8_ops_per_s"), ("fp32", "fp32_ops_per_s"), ("bf16", "bf16_ops_per_s"))
    peaks = [f"{name} {limits[key] / 1e12:.2f}" for name, key in names if limits.get(key)]
    facts = (
        f"{_where(document)} {_layers(document)}, {_rounds(document['rounds'])}. Limits of the machine in "
        f"the same run: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, 10¹² operations/s: "
        f"{', '.join(peaks)}."
    )
    versions = {row["version"] for row in document["engines"].values() if row.get("version")}
    return f"{facts} Versions: {'; '.join(sorted(versions))}.\n\n{compare_table(document)}"


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def agent(results: Results) -> str:
    """Steps of the agent."""
    document = results.get("agent_step")
    if document is None:
        return MISSING
    return (
        f"{_where(document)} {document['answer_tokens']} tokens of answer.\n\n{agent_table(document['runs'])}"
    )


def lookup(results: Results) -> str:
    """Drafts from prompt and history."""
    document = results.get("lookup")
    if document is None:
        return MISSING
    return f"{_where(document)}\n\n{lookup_table(document['runs'])}"


def serving(results: Results) -> str:
    """Clients at one server."""
    document = results.get("serving")
    if document is None:
        return MISSING
    return (
        f"{_where(document)} {document['recipe']}, {document['answer_tokens']} tokens of answer.\n\n"
        f"{serving_table(document)}"
    )


def soak(results: Results) -> str:
    """Minutes of everything at once."""
    document = results.get("soak")
    if document is None:
        return MISSING
    count, faults = document["requests"], len(document["faults"])
    return (
        f"{_where(document)} {document['minutes']:g} minutes, {document['clients']} clients, {count:,} "
        f"requests: {faults} faults; anonymous memory {document['anon_mb'][-1]:.0f} MB at the end. A line "
        f"through all but the first {document['warm_up_s']:.0f} seconds rises by "
        f"{document['growth_mb']:.1f} MB."
    )


# --- pieces


def _where(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    if isinstance(machine, str):
        return f"{document['date']}, {machine}, onnxruntime {document['onnxruntime']}."
    units = " ".join(machine["units"])
    return (
        f"{document['date']}, {machine['processor']}, {machine['cores']} cores ({units}), "
        f"onnxruntime {machine['onnxruntime']}, {document.get('threads', machine['cores'])} threads."
    )


def _layers(document: Mapping[str, Any] | None) -> str:
    return f"{document['geometry']['layers']} layers and head" if document else "9B shape"


def _with(results: Results, engine: str) -> Mapping[str, Any] | None:
    """The comparison with most layers that has this engine: the head weighs less in it."""
    documents = [results[name] for name in ("compare-40", "compare") if results.get(name)]
    return next((document for document in documents if engine in document["engines"]), None)


def _engine(document: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (document or {}).get("engines", {}).get(name, {})
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _rate(times: Mapping[str, Any]) -> str:
    return f"{times['median_s']:.2f} s ± {times['spread'] / 2:.0%}"


def _share(row: Mapping[str, Any]) -> str:
    for key, name in (("of_int8_peak", "int8 peak"), ("of_bandwidth", "bandwidth")):
        if row.get(key) is not None:
            return f", {row[key]:.0%} of {name}"
    return ""


def _memory(peak: Mapping[str, Any]) -> str:
    anonymous, mapped = peak.get("anon_bytes"), peak.get("file_bytes")
    if anonymous is None or mapped is None:
        return "not available"
    return f"{anonymous / 1e9:.2f} GB anonymous, {mapped / 1e9:.2f} GB mapped"


def _gigabytes(value: float | None) -> str | None:
    return _text(None if value is None else value / 1e9, "{:.2f} GB")


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _at_most(value: float | None, limit: float) -> bool | None:
    return None if value is None else value <= limit


def _at_least(value: float | None, limit: float) -> bool | None:
    return None if value is None else value >= limit
