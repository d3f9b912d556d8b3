"""Tables of docs/benchmarks.md, from the documents that the benchmarks wrote.

In: documents by name, any of which may be missing. Out: Markdown by section. A figure that was not measured
says so; nothing is filled in by hand. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent_step import table as agent_table
from compare_report import markdown as compare_table
from lookup import table as lookup_table
from native_kernels import markdown as kernels_table
from native_loss import markdown as kernels_loss_table
from report_pieces import BENCHES, MISSING, Results, gigabytes, layers_of, memory, table, where
from report_targets import targets
from serving import table as serving_table


def sections(results: Results, without: Results) -> dict[str, str]:
    """Every section by the name of its markers.

    Args:
        results: of the machine at hand.
        without: of one whose processor has no matrix units.
    """
    return {
        "targets": targets(results),
        "full-size": full_size(results),
        "bench": benches(results),
        "profile": profiles(results),
        "compare": compared(results),
        "kernels": kernels(results),
        "kernels-loss": kernels_loss(results),
        "agent": agent(results),
        "lookup": lookup(results),
        "serving": serving(results),
        "soak": soak(results),
        "bench-without": benches(without),
        "compare-without": compared(without),
        "agent-without": agent(without),
        "lookup-without": lookup(without),
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
            ("export, peak anonymous memory", str(gigabytes(document["export"]["peak"]["anon_bytes"]))),
        ]
    pieces = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    rows.append(("bundle", f"{document['bundle_bytes'] / 1e9:.2f} GB: {pieces}"))
    if "prepare" in document:
        rows.append(("preparing weights, once per machine", f"{document['prepare']['seconds']:.0f} s"))
    rows += [
        ("load, files in the page cache as far as they fit", f"{document['load']['seconds']:.1f} s"),
        ("memory while loading", memory(document["load"]["peak"])),
        ("prompt", f"{usage['prompt_tokens']} tokens, {usage['image_tokens']} of the image"),
        ("image encoding", f"{timings['image_ms'] / 1e3:.1f} s"),
        ("prefill", f"{timings['prefill_tokens_per_s']:.1f} tokens/s"),
        ("time to first token", f"{timings['ttft_ms'] / 1e3:.1f} s"),
        ("decode", f"{timings['decode_tokens_per_s']:.2f} tokens/s"),
        ("peak memory of the run", memory(run["peak"])),
        ("rate at which decode reads the decoder's weights", f"{document['decode_read_gb_per_s']:.1f} GB/s"),
        ("read bandwidth of the machine, same run", f"{document['read_bandwidth_gb_per_s']:.1f} GB/s"),
    ]
    return f"{where(document)}\n\n" + table((document["precision"].upper(), ""), rows)


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
        add(f"memory, {phase}", [memory(item["memory"].get(phase, {})) for item in documents])
    chosen = "; ".join(
        f"{title}: prompts by {choices.get('prefill', '?')}, weights {choices.get('weights', '?')}"
        for title, choices in ((title, item["choices"]) for title, item in found.items())
    )
    return f"{where(documents[0])} {chosen}.\n\n" + table(("", *found), rows)


def profiles(results: Results) -> str:
    """Which operators take the time, for each bundle that was traced."""
    rows = [
        (title, profile["name"], f"{profile['seconds']:.2f}", _shares(profile["shares"]))
        for name, title in BENCHES.items()
        for profile in results.get(name, {}).get("profiles", ())
    ]
    return table(("bundle", "work", "traced, s", "operators"), rows) if rows else MISSING


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
        f"{where(document)} {layers_of(document)}, {_rounds(document['rounds'])}. Limits of the machine in "
        f"the same run: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, 10¹² operations/s: "
        f"{', '.join(peaks)}."
    )
    versions = {row["version"] for row in document["engines"].values() if row.get("version")}
    return f"{facts} Versions: {'; '.join(sorted(versions))}.\n\n{compare_table(document)}"


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def kernels(results: Results) -> str:
    """The compiled kernels beside onnxruntime's."""
    document = results.get("native_kernels")
    return MISSING if document is None else f"{where(document)}\n\n{kernels_table(document)}"


def kernels_loss(results: Results) -> str:
    """What ways of reading prompts lose."""
    document = results.get("native_loss")
    if document is None:
        return MISSING
    return f"{where(document)} {document['screens']} screens.\n\n{kernels_loss_table(document)}"


def agent(results: Results) -> str:
    """Steps of the agent."""
    document = results.get("agent_step")
    if document is None:
        return MISSING
    return (
        f"{where(document)} {document['answer_tokens']} tokens of answer.\n\n{agent_table(document['runs'])}"
    )


def lookup(results: Results) -> str:
    """Drafts from prompt and history."""
    document = results.get("lookup")
    if document is None:
        return MISSING
    return f"{where(document)}\n\n{lookup_table(document['runs'])}"


def serving(results: Results) -> str:
    """Clients at one server."""
    document = results.get("serving")
    if document is None:
        return MISSING
    return (
        f"{where(document)} {document['recipe']}, {document['answer_tokens']} tokens of answer.\n\n"
        f"{serving_table(document)}"
    )


def soak(results: Results) -> str:
    """Minutes of everything at once."""
    document = results.get("soak")
    if document is None:
        return MISSING
    count, faults = document["requests"], len(document["faults"])
    return (
        f"{where(document)} {document['minutes']:g} minutes, {document['clients']} clients, {count:,} "
        f"requests: {faults} faults; anonymous memory {document['anon_mb'][-1]:.0f} MB at the end. A line "
        f"through all but the first {document['warm_up_s']:.0f} seconds rises by "
        f"{document['growth_mb']:.1f} MB."
    )


def _rate(times: Mapping[str, Any]) -> str:
    return f"{times['median_s']:.2f} s ± {times['spread'] / 2:.0%}"


def _share(row: Mapping[str, Any]) -> str:
    for key, name in (("of_int8_peak", "int8 peak"), ("of_bandwidth", "bandwidth")):
        if row.get(key) is not None:
            return f", {row[key]:.0%} of {name}"
    return ""
