"""What a bundle may lose: limits per recipe, and whether figures keep them.

In: a recipe as the manifest records it, and figures. Out: `Criterion`s, each kept or not. Knows nothing of
how figures are measured. docs/parity.md says where the numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .metrics import Share


@dataclass(frozen=True)
class Limits:
    """Bounds, over the answers.

    Attributes:
        name: of the row of the table.
        mean_kl: largest mean divergence in nats, on top of the floor's.
        p99_kl: largest 99th percentile, on top of the floor's.
        top1: least share of positions with the same likeliest token, less those that the floor changes.
        vision_cosine: least mean cosine of the vision features.
        lost_taps: largest share of the reference's taps in the box that land outside.
    """

    name: str
    mean_kl: float
    p99_kl: float
    top1: float
    vision_cosine: float
    lost_taps: float


LIMITS = {
    limits.name: limits
    for limits in (
        Limits("fp32", 1e-7, 1e-6, 0.9999, 0.99999, 0.0),
        Limits("fp16", 1e-5, 1e-4, 0.9995, 0.9999, 0.001),
        Limits("int8-weights", 1e-5, 3e-4, 0.9995, 0.9995, 0.003),
        Limits("int8", 1e-4, 2e-3, 0.9995, 0.999, 0.003),
        Limits("int4", 5e-4, 1e-2, 0.995, 0.99, 0.003),
    )
}
"""By the fewest bits of a weight; int8-weights are 8 bits whose activations stay float. What has less than 4
bits is judged by the row of int4, and should fail."""

ROUNDED_ACTIVATIONS = 4
"""The accuracy level at which a kernel rounds activations to 8-bit integers."""


@dataclass(frozen=True)
class Criterion:
    """One limit and the figure that it is about.

    Attributes:
        name: what is measured.
        value: the figure.
        limit: the bound.
        at_most: whether the figure must not exceed the bound; else it must reach it.
        kept: whether it does; for shares the near end of the 95 % interval decides, so that a handful of
            rows does not fail a good bundle.
        note: a remark for a reader, or "".
    """

    name: str
    value: float
    limit: float
    at_most: bool
    kept: bool
    note: str = ""


def limits_for(recipe: Mapping[str, Any]) -> Limits:
    """The row for a recipe: by its activations if it keeps weights float, else by its fewest bits.

    Args:
        recipe: as in a manifest.
    """
    formats = [rule.get("format") for rule in recipe.get("rules", ())]
    bits = [form["bits"] for form in formats if form is not None]
    if bits and min(bits) < 8:
        return LIMITS["int4"]
    if bits:
        rounded = recipe.get("accuracy_level", ROUNDED_ACTIVATIONS) == ROUNDED_ACTIVATIONS
        return LIMITS["int8" if rounded else "int8-weights"]
    return LIMITS["fp16" if recipe.get("activations") == "float16" else "fp32"]


def at_most(name: str, value: float, limit: float, floor: float | None) -> Criterion:
    """A figure that must not exceed a limit, to which the reference's own rounding is added."""
    if floor is None:
        return Criterion(name, value, limit, True, value <= limit)
    return Criterion(
        name, value, limit + floor, True, value <= limit + floor, f"limit {limit:g} + floor {floor:.2g}"
    )


def share_at_least(name: str, share: Share, limit: float) -> Criterion:
    """A share that must reach a limit, unless its interval still holds the limit."""
    low, high = share.interval
    return Criterion(
        name,
        share.value,
        limit,
        False,
        max(high, share.value) >= limit,
        f"{share.hits} of {share.total}, {low:.4f} to {high:.4f}",
    )


def share_at_most(name: str, share: Share, limit: float) -> Criterion:
    """A share that must not exceed a limit, unless its interval still holds the limit."""
    low, high = share.interval
    return Criterion(
        name,
        share.value,
        limit,
        True,
        min(low, share.value) <= limit,
        f"{share.hits} of {share.total}, {low:.4f} to {high:.4f}",
    )


def at_least(name: str, value: float, limit: float) -> Criterion:
    """A figure that must reach a limit."""
    return Criterion(name, value, limit, False, value >= limit)
