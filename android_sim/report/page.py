"""Simulations as one HTML file: verdict, timeline, figures and their sources; no script, nothing to load.

In: one `Simulation` or several. Out: HTML text. Everything that comes from a model, a bundle or a profile is
escaped, so that none of them can write into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from autoglm_edge.android_sim.simulation import Simulation
from autoglm_edge.android_sim.verdict import LABELS

from .matrix import Matrix
from .timeline import draw_svg
from .words import parity_text, size

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 0 auto;
  max-width: 1100px; padding: 28px 24px 60px; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 6px; }
p { margin: 4px 0 10px; color: #4b5563; max-width: 84ch; }
.verdict { display: inline-block; padding: 2px 12px; border-radius: 6px; color: #fff; font-weight: 600; }
.ok { background: #059669; } .bad { background: #dc2626; } .poor { background: #d97706; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile { border: 1px solid #e5e7eb; border-radius: 8px; padding: 10px 16px; min-width: 150px; }
.tile b { display: block; font-size: 21px; font-weight: 600; } .tile span { color: #6b7280; font-size: 13px; }
table { border-collapse: collapse; font-size: 13.5px; } td, th { padding: 3px 16px 3px 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #f3f4f6; } th { color: #6b7280; font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.mono, pre { font: 12px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } section { margin-top: 40px; }
"""


def html_page(found: Sequence[Simulation]) -> str:
    """The page, a complete document; with several simulations their matrix comes first."""
    parts = []
    if len(found) > 1:
        parts += ["<h1>What lives where</h1>", _matrix(found)]
    parts += [_section(item) for item in found]
    title = found[0].title if len(found) == 1 else "Simulated devices"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _matrix(found: Sequence[Simulation]) -> str:
    head, *rows = Matrix.of(found).rows()
    return _table(head, rows)


def _section(item: Simulation) -> str:
    verdict = item.verdict
    colour = "ok" if item.lives else "poor" if verdict.name == "fits_thrash" else "bad"
    reason = verdict.reason[:1].upper() + verdict.reason[1:]
    parts = [
        f'<h1>{escape(item.title)} <span class="verdict {colour}">{escape(LABELS[verdict.name])}</span></h1>',
        f"<p>{escape(reason)}.</p>",
        _tiles(item),
        draw_svg(item.trace, item.budget, verdict, item.title),
        "<h2>Figures</h2>",
        _table((), [(label, words) for label, words in item.rows()]),
        _phases(item),
        _needs(item),
        _notes(item),
        _provenance(item),
    ]
    return "<section>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def _tiles(item: Simulation) -> str:
    verdict, projection = item.verdict, item.projection
    tiles = [
        ("peak, anonymous + shared + swapped", size(verdict.peak_bytes), f"in {verdict.peak_phase or 'all'}"),
        ("headroom", size(verdict.headroom_bytes), f"of {size(item.budget.limit_bytes)}"),
        ("mapped and resident", size(verdict.mapped_bytes), "may be dropped at any time"),
    ]
    if verdict.refault_bytes_per_token is not None and item.trace.result is not None:
        tiles.append(("read again", size(verdict.refault_bytes_per_token), "per token, in decoding"))
    if projection is not None:
        tiles.append(
            ("projected, tokens/s", str(projection.burst), f"{projection.sustained} when warm, not measured")
        )
    if item.parity is not None:
        tiles.append(
            (
                "same likeliest token",
                f"{100 * item.parity.top1_agreement:.2f} %",
                f"of {item.parity.positions} positions",
            )
        )
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _phases(item: Simulation) -> str:
    if not item.trace.phases:
        return ""
    head, *rows = item.phase_table()
    text = (
        "Peaks of each phase. Anonymous counts shared and swapped memory as well; the forecast was made "
        "from the bundle alone."
    )
    return f"<h2>Phases</h2>\n<p>{text}</p>\n" + _table(head, rows, numbers=True)


def _needs(item: Simulation) -> str:
    if item.forecast is None:
        return ""
    rows = [
        (entry.name, entry.memory, size(entry.bytes), ", ".join(entry.phases))
        for entry in item.forecast.need.items
    ]
    text = "What the forecast adds up, from the manifest and the runtime's own formulas."
    return f"<h2>Where the memory goes</h2>\n<p>{text}</p>\n" + _table(
        ("item", "kind", "bytes", "phases"), rows
    )


def _notes(item: Simulation) -> str:
    notes = [*item.notes, *item.verdict.notes]
    if not notes:
        return ""
    return "<h2>Notes</h2>\n" + "".join(f"<p>{escape(note)}</p>" for note in notes)


def _provenance(item: Simulation) -> str:
    """What it ran on, and where the device's figures come from."""
    facts = [
        ("bundle", f"{item.subject.name}, {item.subject.recipe}, from {item.subject.model}"),
        ("fingerprint", item.subject.fingerprint),
        ("ran on", str(item.machine)),
        ("date", item.date),
        (
            "sampling",
            f"{len(item.trace.samples)} samples, {100 * item.trace.sampling_share:.2f} % of a core",
        ),
    ]
    if item.parity is not None:
        facts.append(("parity", parity_text(item.parity)))
    if item.trace.result is not None:
        facts.append(("answer", item.trace.result.text[:400]))
    figures = [
        (name, f"{figure.value:g}", figure.unit, figure.basis, figure.source)
        for name, figure in item.device.figures.items()
    ]
    cores = f"<p>{escape(item.device.cores)}</p>" if item.device.clusters else ""
    return (
        "<h2>What was simulated</h2>\n"
        + _table((), facts)
        + f"<h2>{escape(item.device.name)}</h2>\n{cores}"
        + _table(("figure", "value", "unit", "basis", "source"), figures)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table; with `numbers` all columns but the first are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        found = ""
        for index, words in enumerate(cells):
            side = ' class="number"' if numbers and index else ""
            found += f"<{tag}{side}>{escape(words)}</{tag}>"
        return f"<tr>{found}</tr>"

    top = line(head, "th") if head else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"
