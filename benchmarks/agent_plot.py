"""A step of the agent as a stacked bar: reuse, image, prefill and decode, a bar per bundle and budget.

In: the document of `agent_step.py`. Out: SVG text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoglm_edge.parity import svg
from autoglm_edge.parity.svg import COLOURS, FAINT, GRID, INK

PIECES = (("reuse", COLOURS[4]), ("image", COLOURS[2]), ("prefill", COLOURS[0]), ("decode", COLOURS[3]))
LEFT, WIDTH, ROW, TOP = 260, 560, 26, 44


def plot(document: Mapping[str, Any]) -> str:
    """The last step of each run."""
    rows = []
    for run in document["runs"]:
        if run["steps"]:
            step = run["steps"][-1]
            state = "warm" if run["warm"] else "cold"
            rows.append((f"{run['bundle']}, {step['image_tokens']} image tokens, {state}", step))
    longest = max([step["total_s"] for _, step in rows], default=1.0) or 1.0
    height = TOP + ROW * len(rows) + 34
    parts = [f'<rect width="{LEFT + WIDTH + 90}" height="{height}" fill="#fff"/>']
    place = float(LEFT)
    for name, colour in PIECES:
        parts += [svg.rect(place, 12, 12, 12, colour), svg.text(place + 18, 23, name, INK, "start")]
        place += 90
    parts.append(svg.line(LEFT, TOP - 6, LEFT, TOP + ROW * len(rows), GRID))
    for index, (name, step) in enumerate(rows):
        top, x = TOP + ROW * index, float(LEFT)
        parts.append(svg.text(LEFT - 10, top + 16, name, INK, "end"))
        for piece, colour in PIECES:
            length = step[f"{piece}_s"] / longest * WIDTH
            if length >= 0.5:
                parts.append(svg.rect(x, top + 2, length, ROW - 8, colour))
            x += length
        parts.append(svg.text(x + 8, top + 16, f"{step['total_s']:.1f} s", INK, "start"))
    caption = f"one step with {document['answer_tokens']} tokens of answer, {document['date']}"
    parts.append(svg.text(LEFT, height - 10, caption, FAINT, "start", size=11))
    return svg.document(LEFT + WIDTH + 90, height, parts)
