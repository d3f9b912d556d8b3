"""The timeline of a run: memory by kind over time, its phases, the limits, and what was read again.

In: a `Trace`, the `Budget` and the `Verdict`. Out: a PNG file, or an `<svg>` element for a page. Knows
nothing of how either is drawn.

Anonymous, shared and swapped memory stand at the bottom, one on the other: they must stay below the lines.
Mapped pages lie on top of them, in a pale colour: these may be dropped, and count against the limit only
where no other process had them in memory before. So the control group's own count has a line of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.trace import Sample, Trace
from autoglm_edge.android_sim.verdict import LABELS, Verdict

from .canvas import Canvas, PngCanvas, Point, SvgCanvas
from .words import size

WIDTH, HEIGHT = 1080, 600
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 26, 128, 74
_LOWER = 104
"""Height of the lower plot, where there is one."""
_GAP = 34
_COLUMNS = 900
"""Points of a curve at most; more than there are pixels show nothing."""
_INK, _FAINT, _GRID, _LIMIT = "#1f2937", "#6b7280", "#e5e7eb", "#b91c1c"
KINDS: tuple[tuple[str, str, Callable[[Sample], int]], ...] = (
    ("anonymous", "#2563eb", lambda sample: sample.anon_bytes),
    ("shared", "#7c3aed", lambda sample: sample.shmem_bytes),
    ("swapped", "#d97706", lambda sample: sample.swap_bytes),
    ("mapped from files", "#bfdbd0", lambda sample: sample.file_bytes),
)
"""From the bottom up: name, colour, bytes of a sample."""
_PHASE_COLOURS = {
    "start": "#e5e7eb",
    "load": "#dbeafe",
    "image": "#fde68a",
    "prefill": "#c7d2fe",
    "decode": "#bbf7d0",
    "score": "#fbcfe8",
    "done": "#e5e7eb",
}
_CHARGED = "#111827"
_REREAD, _STALL = "#ea580c", "#6d28d9"
_LEAST_STALL = 0.005
"""Share of time spent waiting for memory that is worth a line."""
_FAR = 2.5
"""A limit further above the peak than this is named and not drawn: the plot would be empty."""


def draw_png(trace: Trace, budget: Budget, verdict: Verdict, title: str, path: Path) -> None:
    """Write the timeline as a PNG.

    Raises:
        SimulationError: the file cannot be written.
    """
    canvas = PngCanvas(WIDTH, HEIGHT)
    draw(canvas, trace, budget, verdict, title)
    canvas.save(path)


def draw_svg(trace: Trace, budget: Budget, verdict: Verdict, title: str) -> str:
    """The timeline as an `<svg>` element."""
    canvas = SvgCanvas(WIDTH, HEIGHT)
    draw(canvas, trace, budget, verdict, title)
    return canvas.document()


def draw(canvas: Canvas, trace: Trace, budget: Budget, verdict: Verdict, title: str) -> None:
    """Draw the timeline."""
    samples = thinned(trace.samples, _COLUMNS)
    end = max(trace.seconds, samples[-1].at_s if samples else 0.0, 1e-3)
    lower = _has_lower(trace)
    bottom = HEIGHT - _BOTTOM - (_LOWER + _GAP if lower else 0)
    x = _scale(0.0, end, _LEFT, WIDTH - _RIGHT)
    highest = max((_total(sample) for sample in samples), default=0)
    drawn_limits = [
        (value, name)
        for value, name in _limits(trace, budget)
        if value <= _FAR * max(highest, verdict.peak_bytes, 1)
    ]
    top_value = 1.08 * max([highest, *(value for value, _ in drawn_limits), 1])
    y = _scale(0.0, top_value, bottom, _TOP)
    _head(canvas, trace, budget, verdict, title)
    _grid(canvas, x, y, end, top_value, bottom)
    unnamed = _phases(canvas, trace, x, end, bottom)
    _stack(canvas, samples, x, y)
    counted: list[Point] = [
        (x(sample.at_s), y(min(sample.charged_bytes, top_value)))
        for sample in samples
        if sample.charged_bytes is not None
    ]
    if len(counted) > 1:
        canvas.line(counted, _CHARGED, width=1.3)
    _lines(canvas, drawn_limits, _limits(trace, budget), y)
    _moment(canvas, verdict, samples, x, y)
    if lower:
        _lower(canvas, trace, x, HEIGHT - _BOTTOM - _LOWER, HEIGHT - _BOTTOM)
    _time_axis(canvas, x, end, HEIGHT - _BOTTOM)
    _legend(canvas, samples, unnamed, counted=len(counted) > 1)


def thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most so many samples: of each stretch the one with the largest total, so that no peak is lost."""
    if len(samples) <= most:
        return list(samples)
    inner, found = samples[1:-1], [samples[0]]
    count = max(1, most - 2)
    for index in range(count):
        part = inner[index * len(inner) // count : (index + 1) * len(inner) // count]
        if part:
            found.append(max(part, key=_total))
    return [*found, samples[-1]]


def _limits(trace: Trace, budget: Budget) -> list[tuple[int, str]]:
    """The lines: the limit, and where compressed memory is on top, the line above which it kills."""
    found = [(budget.limit_bytes, "limit")]
    if trace.enforced.swap_bytes:
        found.append((budget.limit_bytes + trace.enforced.swap_bytes, "limit + swap"))
    return found


def _total(sample: Sample) -> int:
    return sample.held_bytes + sample.file_bytes


def _head(canvas: Canvas, trace: Trace, budget: Budget, verdict: Verdict, title: str) -> None:
    colour = "#059669" if verdict.lives else "#d97706" if verdict.name == "fits_thrash" else "#dc2626"
    canvas.text(_LEFT, 36, title[:78], _INK, size=19, bold=True)
    label = LABELS[verdict.name]
    wide = canvas.width_of(label, 14) + 24
    canvas.rect(WIDTH - _RIGHT - wide, 18, wide, 26, colour)
    canvas.text(WIDTH - _RIGHT - wide / 2, 36, label, "#ffffff", anchor="middle", size=14, bold=True)
    reason = verdict.reason[:1].upper() + verdict.reason[1:]
    reason = reason if len(reason) <= 132 else reason[:129] + "..."
    canvas.text(_LEFT, 60, reason, _INK, size=13)
    held = f"{trace.enforced.kind.replace('_', ' ')}, limit {size(budget.limit_bytes)}"
    if trace.enforced.swap_bytes:
        held += f", swap {size(trace.enforced.swap_bytes)}"
    peak = f"peak {size(verdict.peak_bytes)} in {verdict.peak_phase or 'the run'}"
    canvas.text(_LEFT, 81, f"{held}; anonymous + shared + swapped: {peak}", _FAINT, size=12)


def _grid(
    canvas: Canvas,
    x: Callable[[float], float],
    y: Callable[[float], float],
    end: float,
    top_value: float,
    bottom: float,
) -> None:
    unit, name = (1e9, "GB") if top_value >= 2e9 else (1e6, "MB")
    for value in ticks(top_value / unit, 6):
        level = y(value * unit)
        canvas.line([(x(0), level), (x(end), level)], _GRID)
        canvas.text(_LEFT - 8, level + 4, f"{value:g}", _FAINT, anchor="end", size=12)
    canvas.text(_LEFT - 8, _TOP - 10, name, _FAINT, anchor="end", size=12)
    canvas.line([(x(0), bottom), (x(end), bottom)], _FAINT)


def _phases(
    canvas: Canvas, trace: Trace, x: Callable[[float], float], end: float, bottom: float
) -> list[str]:
    """A strip above the plot, and a thin line where each phase begins; names that had no room there."""
    unnamed = []
    for phase in trace.phases:
        left, right = x(phase.start_s), x(min(end, end if phase.stop_s is None else phase.stop_s))
        if right - left < 0.5:
            continue
        canvas.rect(left, _TOP - 26, right - left - 1, 18, _PHASE_COLOURS.get(phase.name, "#e5e7eb"))
        if canvas.width_of(phase.name, 12) + 6 < right - left:
            canvas.text((left + right) / 2, _TOP - 13, phase.name, _INK, anchor="middle", size=12)
        elif phase.name in _PHASE_COLOURS and phase.name not in ("start", "done"):
            unnamed.append(phase.name)
        if phase.start_s > 0:
            canvas.line([(left, _TOP - 8), (left, bottom)], "#d1d5db")
    return unnamed


def _stack(
    canvas: Canvas, samples: Sequence[Sample], x: Callable[[float], float], y: Callable[[float], float]
) -> None:
    if not samples:
        return
    below = [0.0] * len(samples)
    for _, colour, value in KINDS:
        above = [base + value(sample) for base, sample in zip(below, samples, strict=True)]
        if any(high > low for high, low in zip(above, below, strict=True)):
            upper: list[Point] = [
                (x(sample.at_s), y(level)) for sample, level in zip(samples, above, strict=True)
            ]
            under = [(x(sample.at_s), y(level)) for sample, level in zip(samples, below, strict=True)]
            canvas.area([*upper, *reversed(under)], colour)
        below = above


def _lines(
    canvas: Canvas,
    drawn: Sequence[tuple[int, str]],
    every: Sequence[tuple[int, str]],
    y: Callable[[float], float],
) -> None:
    for index, (value, name) in enumerate(drawn):
        level = y(value)
        canvas.line(
            [(_LEFT, level), (WIDTH - _RIGHT, level)],
            _LIMIT,
            width=1.8 if index == 0 else 1.4,
            dashed=index > 0,
        )
        words = f"{name} {size(value)}"
        wide = canvas.width_of(words, 12) + 10
        canvas.rect(_LEFT + 6, level - 19, wide, 16, "#ffffff")
        canvas.text(_LEFT + 11, level - 7, words, _LIMIT, size=12, bold=True)
    far = [f"{name} {size(value)}" for value, name in every if (value, name) not in drawn]
    if far:
        words = "far above: " + ", ".join(far)
        wide = canvas.width_of(words, 12) + 10
        canvas.rect(_LEFT + 6, _TOP + 5, wide, 17, "#ffffff")
        canvas.text(_LEFT + 11, _TOP + 18, words, _LIMIT, size=12, bold=True)


def _moment(
    canvas: Canvas,
    verdict: Verdict,
    samples: Sequence[Sample],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> None:
    """A mark where it was decided, unless that is the whole run."""
    if verdict.at_s is None or verdict.lives or not samples:
        return
    near = min(samples, key=lambda sample: abs(sample.at_s - (verdict.at_s or 0.0)))
    place, level = x(verdict.at_s), y(near.held_bytes)
    canvas.dot(place, level, 6.5, "#ffffff")
    canvas.dot(place, level, 4.5, _LIMIT)
    words = f"{LABELS[verdict.name]}, {verdict.at_s:.2f} s"
    wide = canvas.width_of(words, 13) + 10
    left = place + 12 if place + wide + 18 < WIDTH - _RIGHT else place - wide - 12
    top = max(_TOP + 24, level - 8)
    canvas.rect(left, top - 13, wide, 19, "#ffffff")
    canvas.text(left + 5, top + 1, words, _LIMIT, size=13, bold=True)


def _has_lower(trace: Trace) -> bool:
    """Whether the host told of anything that was read again or waited for."""
    return any(
        sample.refaulted_bytes or (sample.psi_some_s or 0) > _LEAST_STALL or sample.read_bytes
        for sample in trace.samples
    )


def _rates(trace: Trace, name: str, bins: int, end: float) -> list[float]:
    """A counter's rise per second in equal stretches of time."""
    found = [0.0] * bins
    before_s, before = 0.0, 0.0
    for sample in trace.samples:
        value = getattr(sample, name)
        if value is None:
            continue
        rise, span = max(0.0, value - before), sample.at_s - before_s
        first = min(bins - 1, int(before_s / end * bins))
        last = min(bins - 1, int(sample.at_s / end * bins))
        for index in range(first, last + 1):  # spread over the time in which it may have happened
            left, right = max(before_s, index * end / bins), min(sample.at_s, (index + 1) * end / bins)
            share = max(0.0, right - left) / span if span > 0 else 1.0 / (last - first + 1)
            found[index] += rise * share
        before_s, before = sample.at_s, float(value)
    return [value * bins / end for value in found]


def _lower(canvas: Canvas, trace: Trace, x: Callable[[float], float], top: float, bottom: float) -> None:
    """What came from storage per second as bars, and how long it waited for memory as a line."""
    end = max(trace.seconds, trace.samples[-1].at_s, 1e-3)
    name = "refaulted_bytes" if any(item.refaulted_bytes for item in trace.samples) else "read_bytes"
    bins = 180
    rates = _rates(trace, name, bins, end)
    highest = max(rates)
    unit, unit_name = (1e9, "GB/s") if highest >= 2e9 else (1e6, "MB/s")
    y = _scale(0.0, max(highest, unit) * 1.1, bottom, top)
    for value in ticks(max(highest, unit) * 1.1 / unit, 3):
        canvas.line([(x(0), y(value * unit)), (x(end), y(value * unit))], _GRID)
        canvas.text(_LEFT - 8, y(value * unit) + 4, f"{value:g}", _FAINT, anchor="end", size=12)
    canvas.text(_LEFT - 8, top - 8, unit_name, _FAINT, anchor="end", size=12)
    for index, rate in enumerate(rates):
        left, right = x(index * end / bins), x((index + 1) * end / bins)
        canvas.rect(left, y(rate), right - left, bottom - y(rate), _REREAD)
    what = "read again from storage" if name == "refaulted_bytes" else "read from storage"
    canvas.text(_LEFT, top - 8, what, _REREAD, size=12, bold=True)
    stalls = _rates(trace, "psi_some_s", bins, end)
    if max(stalls) > _LEAST_STALL:
        points = [
            (x((index + 0.5) * end / bins), bottom - min(1.0, value) * (bottom - top))
            for index, value in enumerate(stalls)
        ]
        canvas.line(points, _STALL, width=1.6)
        words = "waiting for memory, 0 to 1000 ms per s"
        canvas.text(_LEFT + canvas.width_of(what, 12) + 26, top - 8, words, _STALL, size=12, bold=True)
    canvas.line([(x(0), bottom), (x(end), bottom)], _FAINT)


def _time_axis(canvas: Canvas, x: Callable[[float], float], end: float, bottom: float) -> None:
    for value in ticks(end, 10):
        canvas.line([(x(value), bottom), (x(value), bottom + 5)], _FAINT)
        canvas.text(x(value), bottom + 19, f"{value:g}", _FAINT, anchor="middle", size=12)
    canvas.text(WIDTH - _RIGHT, bottom + 36, "seconds", _FAINT, anchor="end", size=12)


def _legend(canvas: Canvas, samples: Sequence[Sample], unnamed: Sequence[str], *, counted: bool) -> None:
    place, level = float(_LEFT), HEIGHT - 22
    for name, colour, value in KINDS:
        if not any(value(sample) for sample in samples):
            continue
        canvas.rect(place, level - 10, 12, 12, colour)
        canvas.text(place + 18, level, name, _INK, size=13)
        place += 18 + canvas.width_of(name, 13) + 24
    if counted:  # pages of libraries that others had in memory before are mapped here and counted there
        canvas.line([(place, level - 4), (place + 18, level - 4)], _CHARGED, width=1.3)
        canvas.text(place + 24, level, "what the limit counts, cached files included", _INK, size=13)
    right = float(WIDTH - _RIGHT)
    for name in reversed(dict.fromkeys(unnamed)):
        wide = canvas.width_of(name, 13)
        canvas.text(right, level, name, _INK, anchor="end", size=13)
        canvas.rect(right - wide - 18, level - 10, 12, 12, _PHASE_COLOURS[name])
        right -= wide + 36


def ticks(highest: float, about: int) -> list[float]:
    """Round values from 0 to at most `highest`: steps of 1, 2 or 5 times a power of ten."""
    if not highest > 0 or not math.isfinite(highest):
        return [0.0]
    rough = highest / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(index * step, 12) for index in range(int(highest / step + 1e-9) + 1)]


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)
