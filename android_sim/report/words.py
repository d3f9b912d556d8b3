"""Figures as words and as JSON values, as all reports of this folder write them.

In: bytes, ranges, forecasts. Out: short texts, rows of a label and its words, columns of text. Decides
nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoglm_edge.android_sim.child_result import ParityResult
    from autoglm_edge.android_sim.forecast import Forecast, Reach
    from autoglm_edge.android_sim.projection import Projection


def reach_rows(forecast: Forecast) -> list[tuple[str, str]]:
    """The longest context and the largest picture that fit."""
    context, image = forecast.context, forecast.image
    rows = [("context", _reach_text(context, "tokens"))]
    if image.most:
        alive, smooth = (f" ({pixels / 1e6:.2f} million pixels)" for pixels in forecast.pixels)
        rows.append(("picture", _reach_text(image, "image tokens", smooth, alive)))
    return rows


def projection_rows(projection: Projection | None) -> list[tuple[str, str]]:
    """What decoding on the device may reach."""
    if projection is None:  # it does not come so far, or the profile tells too little
        return []
    return [
        (
            "projected",
            f"{projection.burst} tokens/s on the device, {projection.sustained} when warm; bound by "
            f"{projection.bound}",
        )
    ]


def parity_text(parity: ParityResult) -> str:
    """The output beside the reference."""
    taps = f", {parity.taps_lost} of {parity.taps} taps lost" if parity.taps else ""
    faults = f", {len(parity.faults)} inputs differ" if parity.faults else ""
    return (
        f"mean KL {parity.kl_mean:.3g}, same likeliest token {100 * parity.top1_agreement:.2f} % of "
        f"{parity.positions}, {parity.same_answers} of {parity.cases} answers the same{taps}{faults}"
    )


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= least:
            return f"{count / least:.2f} {unit}" if unit == "GB" else f"{count / least:.1f} {unit}"
    return f"{count:.0f} B"


def _reach_text(reach: Reach, unit: str, smooth: str = "", alive: str = "") -> str:
    if reach.smooth == reach.most:
        return f"all {reach.most} {unit} of the model{smooth}"
    if not reach.alive:
        return "none fits: it is killed even with one token"
    lives = "" if reach.alive == reach.smooth else f"; it lives up to {reach.alive}{alive}, and thrashes"
    if not reach.smooth:
        return f"none fits with the weights in memory{lives}"
    return f"up to {reach.smooth} of {reach.most} {unit}{smooth}{lives}"


def plain(value: Any) -> Any:
    """JSON values: tuples become lists, floats keep six digits, and those that do not exist are None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
