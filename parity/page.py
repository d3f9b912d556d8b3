"""The report as one HTML file: verdict, figures and plots; no script, nothing to load.

In: a `Report`. Out: HTML text. Everything that comes from a model or a file is escaped, so a prompt cannot
write into the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .comparison import CURVE, Comparison, WorstPlace
from .limits import LIMITS
from .plots import COLOURS, Bar, Line, Move, Strip, bars, log_lines, moves, strips
from .report import Report, figure_rows, number, share

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 0 auto;
  max-width: 980px; padding: 28px 24px 60px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 36px 0 6px; }
p { margin: 4px 0 10px; color: #4b5563; max-width: 76ch; }
.verdict { display: inline-block; padding: 2px 12px; border-radius: 6px; color: #fff; font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile { border: 1px solid #e5e7eb; border-radius: 8px; padding: 10px 16px; min-width: 128px; }
.tile b { display: block; font-size: 21px; font-weight: 600; } .tile span { color: #6b7280; font-size: 13px; }
table { border-collapse: collapse; font-size: 13.5px; } td, th { padding: 3px 14px 3px 0; text-align: right;
  vertical-align: top; border-bottom: 1px solid #f3f4f6; } td:first-child, th:first-child { text-align: left;
  white-space: pre; } th { color: #6b7280; font-weight: 600; } td.left, th.left { text-align: left; }
.ok { color: #059669; font-weight: 600; } .bad { color: #dc2626; font-weight: 600; }
code { font: 12px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 32px; align-items: flex-start; }
svg { max-width: 100%; height: auto; }
"""
STRIPS = 48
"""Answers drawn, the ones that part first."""


def html_page(report: Report) -> str:
    """The page, a complete document."""
    parts = [_head(report)]
    own = report.candidate
    if own is not None:
        parts += [_tiles(report, own), _criteria(report), _faults(report)]
        parts += [_divergence(report), _groups(own), _answers(own), _actions(own), _vision(own)]
        parts += [_worst(own.worst), _table(report)]
    else:
        parts += [_criteria(report), _faults(report)]
    parts.append(_provenance(report))
    title = escape(f"Parity of {report.bundle.model} {report.bundle.recipe}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _head(report: Report) -> str:
    colour, word = ("#059669", "passed") if report.passed else ("#dc2626", "failed")
    return (
        f'<h1>{escape(report.bundle.model)}, {escape(report.bundle.recipe)} <span class="verdict" '
        f'style="background:{colour}">{word}</span></h1>\n<p>Against {escape(report.recorded)}. '
        f"Limits of {escape(report.limits)}; bundle {report.bundle.total_bytes / 1e6:,.1f} MB.</p>"
    )


def _tiles(report: Report, own: Comparison) -> str:
    floor = "" if report.floor is None else f"floor {number(report.floor.answer.kl.mean)}"
    items = [
        ("mean KL, nats", number(own.answer.kl.mean), floor),
        (
            "same likeliest token",
            f"{100 * own.answer.top1.value:.2f} %",
            f"{own.answer.top1.total} positions",
        ),
        ("same answers", f"{own.same_answers.hits} of {own.same_answers.total}", "greedy, token by token"),
    ]
    if own.actions.arguments.total:
        items.append(
            ("same actions", share(own.actions.arguments).split(" (")[0], f"of {own.actions.arguments.total}")
        )
    if own.actions.candidate_hits.total:
        hits = own.actions.candidate_hits
        items.append(
            ("taps in the box", f"{100 * hits.value:.1f} %", f"reference {share(own.actions.reference_hits)}")
        )
    if own.images:
        items.append(("vision cosine", f"{own.vision_cosine:.5f}", f"{len(own.images)} images"))
    tiles = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in items
    )
    return f'<div class="tiles">{tiles}</div>'


def _criteria(report: Report) -> str:
    rows = [
        [
            escape(item.name),
            number(item.value),
            f"{'≤' if item.at_most else '≥'} {number(item.limit)}",
            '<span class="ok">kept</span>' if item.kept else '<span class="bad">not kept</span>',
            escape(item.note),
        ]
        for item in report.criteria
    ]
    return "<h2>Limits</h2>\n" + _html_table(["", "figure", "limit", "", ""], rows)


def _faults(report: Report) -> str:
    if not report.faults:
        return ""
    rows = [[escape(item.case), escape(item.what), escape(item.detail)] for item in report.faults]
    text = (
        "The engine makes something else of these prompts than what was recorded; other figures may follow "
        "from that."
    )
    return _section("Inputs that differ", text, _html_table(["prompt", "what", "detail"], rows, left=True))


def _divergence(report: Report) -> str:
    lines = [
        Line(
            column.title, COLOURS[min(index if report.floor else index + (index > 0), 4)], column.answer.curve
        )
        for index, column in enumerate(report.columns)
        if column.answer.curve
    ]
    if not lines:
        return ""
    columns = [f"{value:g} %" for value in CURVE[:-1]] + ["max"]
    limits = LIMITS.get(report.limits)
    marks = [] if limits is None else [(limits.mean_kl, f"limit of the mean, {report.limits}")]
    text = (
        "KL divergence in nats over the positions of the answers: so many of them lie below the line. A "
        "bundle is as good as the original where it runs along the floor."
    )
    plot = log_lines(columns, lines, marks=marks)
    return _section("How far the next-token distributions are apart", text, plot)


def _groups(own: Comparison) -> str:
    items = [
        Bar(name, figures.kl.mean, f"{number(figures.kl.mean)}, {figures.kl.count} tokens")
        for name, figures in own.groups.items()
        if figures.kl.count
    ]
    return _section("By kind of prompt", "Mean KL divergence, logarithmic.", bars(items, log=True))


def _answers(own: Comparison) -> str:
    ordered = sorted(own.greedy, key=lambda item: (item.same, item.prefix))[:STRIPS]
    items = [
        Strip(
            item.case,
            item.prefix,
            item.reference_tokens,
            item.same,
            "same" if item.same else f"parts at {item.prefix}" + _margin(item.margin),
        )
        for item in ordered
    ]
    hidden = len(own.greedy) - len(items)
    more = f" {hidden} more are not shown." if hidden else ""
    text = (
        "The part that both answers have in common. The margin says by how many logits the reference "
        f"preferred its token where they part: near 0 it was a tie.{more}"
    )
    return _section("Greedy answers", text, strips(items))


def _margin(margin: float) -> str:
    return "" if math.isnan(margin) else f", margin {number(margin)}"


def _actions(own: Comparison) -> str:
    actions = own.actions
    if not actions.kinds.total:
        return ""
    drawn = [
        Move(item.reference_point, item.candidate_point, item.candidate_hits)
        for item in actions.outcomes
        if item.reference_point is not None and item.candidate_point is not None
    ]
    different = [item for item in actions.outcomes if not item.same_arguments]
    rows = [
        [
            escape(item.case),
            f"<code>{escape(item.reference)}</code>",
            f"<code>{escape(item.candidate) or '-'}</code>",
            number(item.distance),
        ]
        for item in different[:20]
    ]
    table = _html_table(["prompt", "reference", "bundle", "distance"], rows, left=True) if rows else ""
    note = "" if rows else "<p>Every action is the same.</p>"
    picture = moves(drawn) if drawn else ""
    text = (
        "Rings: where the reference touches. Dots: where the bundle does; red if outside the box. Distances "
        "in thousandths of the screen."
    )
    return _section("Actions", text, f'<div class="row">{picture}<div>{note}{table}</div></div>')


def _vision(own: Comparison) -> str:
    if not own.images:
        return ""
    worst = sorted(own.images, key=lambda image: image.mean_cosine)[:12]
    items = [
        Bar(
            f"{i.case} {i.image + 1}",
            max(0.0, 1 - i.mean_cosine),
            f"{1 - i.mean_cosine:.2g}, least {i.least_cosine:.5f}",
        )
        for i in worst
    ]
    text = "1 - cosine to the reference's, mean over the tokens of an image, logarithmic; the worst images."
    return _section("Vision features", text, bars(items, log=True))


def _worst(places: Sequence[WorstPlace]) -> str:
    rows = [
        [
            escape(item.case),
            number(item.kl),
            f"<code>{escape(item.before[-90:])}</code>",
            f"<code>{escape(item.next_text)}</code>",
            f"<code>{escape(item.reference_best)}</code> / <code>{escape(item.candidate_best)}</code>",
            f"{item.reference_p:.3f} / {item.candidate_p:.3f}",
        ]
        for item in places
    ]
    head = ["prompt", "KL", "text before", "next", "likeliest: reference / bundle", "p of next"]
    return "<h2>Worst positions</h2>\n" + _html_table(head, rows, left=True)


def _table(report: Report) -> str:
    columns = report.columns
    head = ["", *(escape(column.title) for column in columns)]
    rows = [[escape(cell) for cell in row] for row in figure_rows(columns)]
    return "<h2>All figures</h2>\n" + _html_table(head, rows)


def _provenance(report: Report) -> str:
    mark = report.fingerprint
    facts = {
        "bundle": Path(
            report.bundle.path
        ).name,  # a page is passed on; where it was made is nobody's business
        "bundle fingerprint": report.bundle.fingerprint,
        "reference": Path(report.reference).name,
        "reference SHA-256": report.reference_sha256,
        "model": mark.model + (f" at {mark.revision}" if mark.revision else ""),
        "weights SHA-256": mark.weights_sha256,
        "recorded": mark.title,
        "prompts": f"{mark.prompt_set}, seed {mark.seed}, {report.cases} of them",
        "image budget": f"{mark.image.max_tokens} tokens, layout {mark.image_layout}",
        "versions": ", ".join(f"{name} {version}" for name, version in mark.versions.items()),
        "time": f"{report.seconds:.1f} s",
    }
    rows = [[escape(name), f"<code>{escape(value)}</code>"] for name, value in facts.items()]
    return "<h2>What was compared</h2>\n" + _html_table([], rows, left=True)


def _section(title: str, text: str, body: str) -> str:
    return f"<h2>{title}</h2>\n<p>{text}</p>\n{body}"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    side = ' class="left"' if left else ""
    top = "<tr>" + "".join(f"<th{side}>{cell}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td{side}>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"
