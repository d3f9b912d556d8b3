"""The comparison as a picture: a panel of bars per question, an engine a row, the machine's limit as a line.

In: the document of `compare.py`. Out: SVG text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoglm_edge.parity import svg
from autoglm_edge.parity.svg import BAD, COLOURS, FAINT, GRID, INK

OURS = "ours"
NAMES_WIDTH, PANEL_WIDTH, GAP, ROW, TOP = 190, 300, 78, 26, 66


@dataclass(frozen=True)
class Panel:
    """One question.

    Attributes:
        title: above it.
        note: below the title.
        values: tokens per second by engine; an engine that is missing failed.
        limit: what the machine could do, or None where engines do not share one.
    """

    title: str
    note: str
    values: Mapping[str, float]
    limit: float | None


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Prefill at each length, then decode."""
    good = {name: row for name, row in document["engines"].items() if "step" in row}
    found = []
    peak = document["limits"]["int8_ops_per_s"] / (2 * document["layer_weights"])
    for length in map(str, document["prefill"]):
        rates = {
            name: row["prefill"][length]["tokens_per_s"]
            for name, row in good.items()
            if length in row["prefill"]
        }
        found.append(
            Panel(f"prefill of {length} tokens", "tokens/s; line: int8 peak of the machine", rates, peak)
        )
    steps = {name: row["step"]["tokens_per_s"] for name, row in good.items()}
    found.append(Panel("decode", "tokens/s", steps, None))
    return found


def plot(names: Sequence[str], items: Sequence[Panel], caption: str) -> str:
    """All panels side by side."""
    width = NAMES_WIDTH + len(items) * (PANEL_WIDTH + GAP)
    height = TOP + ROW * len(names) + 34
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for index, name in enumerate(names):
        middle = TOP + ROW * index + 17
        colour = COLOURS[0] if name.startswith(OURS) else INK
        parts.append(svg.text(NAMES_WIDTH - 12, middle, name, colour, "end", bold=name.startswith(OURS)))
    for place, panel in enumerate(items):
        parts += _panel(panel, names, NAMES_WIDTH + place * (PANEL_WIDTH + GAP))
    parts.append(svg.text(NAMES_WIDTH, height - 10, caption, FAINT, "start", size=11))
    return svg.document(width, height, parts)


def _panel(panel: Panel, names: Sequence[str], left: float) -> list[str]:
    longest = max([*panel.values.values(), panel.limit or 0.0, 1e-9])
    bottom = TOP + ROW * len(names)
    parts = [
        svg.text(left, 22, panel.title, INK, "start", bold=True),
        svg.text(left, 42, panel.note, FAINT, "start", size=11),
        svg.line(left, TOP - 4, left, bottom, GRID),
    ]
    for index, name in enumerate(names):
        top = TOP + ROW * index
        value = panel.values.get(name)
        if value is None:
            parts.append(svg.text(left + 8, top + 17, "failed", BAD, "start"))
            continue
        length = max(1.5, value / longest * PANEL_WIDTH)
        parts.append(svg.rect(left, top + 3, length, ROW - 8, COLOURS[0 if name.startswith(OURS) else 1]))
        label = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
        parts.append(svg.text(left + length + 6, top + 17, label, INK, "start", halo=True))
    if panel.limit is not None:
        edge = left + panel.limit / longest * PANEL_WIDTH
        parts.append(svg.line(edge, TOP - 4, edge, bottom, BAD, dash="5 4"))
    return parts
