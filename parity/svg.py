"""Pieces of SVG as text: lines, dots, words, and the colours that all plots share.

In: numbers and words. Out: elements as strings, and the `<svg>` element around them. Words are escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
COLOURS = ("#2563eb", "#9ca3af", "#d97706", "#059669", "#7c3aed")
"""Of the bundle, the floor, and baselines."""
GOOD, BAD = "#059669", "#dc2626"


def superscript(exponent: int) -> str:
    """A power as it stands behind its 10."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def document(width: int, height: int, parts: Sequence[str]) -> str:
    """The whole plot, to stand in an HTML page or in a file of its own."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12.5" role="img">'
        f"{''.join(parts)}</svg>"
    )


def line(
    x0: float, y0: float, x1: float, y1: float, colour: str, *, dash: str = "", opacity: float = 1.0
) -> str:
    """From one point to another."""
    style = (f' stroke-dasharray="{dash}"' if dash else "") + (
        f' opacity="{opacity:g}"' if opacity < 1 else ""
    )
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}"{style}/>'


def rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle by its upper left corner."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{colour}"/>'


def dot(x: float, y: float, radius: float, colour: str) -> str:
    """A filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def text(
    x: float,
    y: float,
    words: str,
    colour: str,
    anchor: str,
    *,
    bold: bool = False,
    size: float | None = None,
    halo: bool = False,
) -> str:
    """Words at a base line; `halo` keeps them readable over lines."""
    extra = (' font-weight="600"' if bold else "") + (f' font-size="{size:g}"' if size else "")
    extra += ' paint-order="stroke" stroke="#fff" stroke-width="3"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'
    )
