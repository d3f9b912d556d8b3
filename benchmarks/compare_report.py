"""What a comparison found: medians, shares of the machine's limits, ratios between engines.

In: the reports of all processes, round by round. Out: a document, a table in Markdown. A ratio is the median
of the ratios of single rounds, whose two sides were measured within minutes: on a shared machine no other
number holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Round = Mapping[str, Mapping[str, Any]]
"""Reports of one round by engine; a report holds `error`, or `prefill_s`, `step_s`, `load_s`."""


def summarize(
    rounds: Sequence[Round],
    limits: Sequence[Mapping[str, float]],
    models: Mapping[str, Mapping[str, int]],
    layer_weights: int,
    reference: str,
) -> dict[str, Any]:
    """Rows by engine, in the order of the first round.

    Args:
        rounds: at least one.
        limits: of the machine, one per round: `read_bytes_per_s`, `int8_ops_per_s`.
        models: `weights` and `read_bytes` by engine.
        layer_weights: of all layers, which a prompt is multiplied with.
        reference: the engine that others are divided by.
    """
    rows = {}
    for name in rounds[0]:
        reports = [found[name] for found in rounds if name in found]
        good = [report for report in reports if "error" not in report]
        row: dict[str, Any] = {**models.get(name, {}), "rounds": len(good)}
        if errors := [report["error"] for report in reports if "error" in report]:
            row["error"] = errors[0]
        if good:
            for key in ("version", "plan", "built_for", "bf16_on_matrix_units"):
                if good[0].get(key):
                    row[key] = good[0][key]
            row["load_s"] = statistics.median(report["load_s"] for report in good)
            row["memory"] = {
                key: statistics.median_low(
                    report["memory"][key] for report in good if key in report["memory"]
                )
                for key in good[0].get("memory", {})
            }
            row["prefill"] = {
                length: _prefill(name, length, rounds, limits, layer_weights, reference)
                for length in good[0]["prefill_s"]
            }
            row["step"] = _step(name, rounds, limits, row.get("read_bytes"), reference)
        rows[name] = row
    return rows


def _prefill(
    name: str,
    length: str,
    rounds: Sequence[Round],
    limits: Sequence[Mapping[str, float]],
    layer_weights: int,
    reference: str,
) -> dict[str, Any]:
    seconds = _by_round(rounds, name, lambda report: statistics.median(report["prefill_s"][length]))
    others = _by_round(rounds, reference, lambda report: statistics.median(report["prefill_s"][length]))
    work = 2 * layer_weights * int(length)
    shares = [work / value / limits[index]["int8_ops_per_s"] for index, value in seconds.items()]
    return {**_rate(int(length), seconds, others), "of_int8_peak": statistics.median(shares)}


def _step(
    name: str,
    rounds: Sequence[Round],
    limits: Sequence[Mapping[str, float]],
    read_bytes: int | None,
    reference: str,
) -> dict[str, Any]:
    seconds = _by_round(rounds, name, lambda report: statistics.median(report["step_s"]))
    others = _by_round(rounds, reference, lambda report: statistics.median(report["step_s"]))
    share = None
    if read_bytes:
        share = statistics.median(
            read_bytes / value / limits[index]["read_bytes_per_s"] for index, value in seconds.items()
        )
    return {**_rate(1, seconds, others), "of_bandwidth": share}


def _rate(tokens: int, seconds: dict[int, float], others: dict[int, float]) -> dict[str, Any]:
    ratios = [others[index] / value for index, value in seconds.items() if index in others]
    median = statistics.median(seconds.values())
    return {
        "median_s": median,
        "seconds": list(seconds.values()),
        "tokens_per_s": tokens / median,
        "by_reference": statistics.median(ratios) if ratios else None,
    }


def _by_round(rounds: Sequence[Round], name: str, take: Any) -> dict[int, float]:
    """A number per round in which the engine did not fail."""
    return {
        index: take(found[name])
        for index, found in enumerate(rounds)
        if name in found and "error" not in found[name]
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The table: a row per engine, a column pair per prompt length."""
    rows: Mapping[str, Any] = document["engines"]
    lengths = [str(length) for length in document["prefill"]]
    reference = document["reference"]
    head = ["engine", "bytes a step reads"]
    for length in lengths:
        head += [f"prefill {length}, tokens/s", "of int8 peak", f"× {reference}"]
    head += ["decode, tokens/s", "of bandwidth", f"× {reference}", "load", "anonymous"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [name, f"{row['read_bytes'] / 1e9:.2f} GB" if row.get("read_bytes") else "?"]
        if "step" not in row:
            cells += [f"**failed**: {_cell(row.get('error', 'nothing was measured'))}"]
            cells += [""] * (len(head) - len(cells))
        else:
            for length in lengths:
                cells += _rate_cells(row["prefill"].get(length), "of_int8_peak", 1)
            cells += _rate_cells(row["step"], "of_bandwidth", 2)
            anonymous = row["memory"].get("anon_bytes")
            cells += [f"{row['load_s']:.1f} s", "?" if anonymous is None else f"{anonymous / 1e9:.2f} GB"]
            if "error" in row:
                cells[0] += f" (failed in some rounds: {_cell(row['error'])})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rate_cells(rate: Mapping[str, Any] | None, share: str, digits: int) -> list[str]:
    if rate is None:
        return ["?", "?", "?"]
    part, ratio = rate[share], rate["by_reference"]
    return [
        f"{rate['tokens_per_s']:.{digits}f}",
        "?" if part is None else f"{part:.0%}",
        "?" if ratio is None else f"{ratio:.2f}",
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:160]
