"""One rule of a recipe: a pattern of tensor names, the layers it is limited to, and the format it gives.

In: patterns and layer ranges as a preset or a recipe file writes them. Out: whether a rule decides about a
tensor. Knows how the layers of the decoder and of the vision tower are numbered in tensor names.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Literal, get_args

from autoglm_edge.errors import QuantError

from .channels import ChannelFormat, WeightFormat

Refinement = Literal["none", "search", "gptq"]
"""How integers are chosen. none: each weight goes to the nearest; search: with the scale and zero
point of least squared error; gptq: for the least error of what the layer computes, on calibration data."""

REFINEMENTS: tuple[Refinement, ...] = get_args(Refinement)

_RELATIVE = re.compile(r"(first|last|outer):(?:(\d{1,6})|(\d{1,6})/(\d{1,6}))")
_ABSOLUTE = re.compile(r"\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*")
_VISION = "model.visual."
_LAYER = re.compile(r"(?:model\.language_model\.layers|model\.visual\.blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """What becomes of the tensors whose names match.

    Attributes:
        pattern: of checkpoint tensor names, with the wildcards of `fnmatch`; * also matches dots.
        format: how they are stored; None keeps them float.
        layers: None for all; "first:N", "last:N" or "outer:N" (first and last), where N is a number of layers
            or a fraction of them, such as 1/8, rounded up; or layer numbers from 0, such as "0-4,35-39".
        refine: how the integers are chosen; "none" for floats.
    """

    pattern: str
    format: WeightFormat | None
    layers: str | None = None
    refine: Refinement = "none"

    def __post_init__(self) -> None:
        if not self.pattern:
            raise QuantError('a rule has an empty pattern; "*" matches every tensor')
        if self.refine not in REFINEMENTS:
            raise QuantError(
                f"the rule for {self.pattern} has refine = {self.refine!r}, must be one of "
                f"{', '.join(REFINEMENTS)}"
            )
        if self.format is None and self.refine != "none":
            raise QuantError(
                f'the rule for {self.pattern} keeps it float, so refine = "{self.refine}" means nothing; '
                "remove it"
            )
        if isinstance(self.format, ChannelFormat) and self.refine == "gptq":
            raise QuantError(
                f'the rule for {self.pattern} has refine = "gptq" with a scale per channel, which rounds for '
                'blocks only; take refine = "search" or "none", or blocks, as in the preset int8-blocks'
            )
        if self.layers is None:
            return
        relative = _RELATIVE.fullmatch(self.layers)
        if relative is None and not _ABSOLUTE.fullmatch(self.layers):
            raise QuantError(
                f'the rule for {self.pattern} has layers = "{self.layers}", must look like "first:5", '
                '"last:1/8", "outer:1/8" or "0-4,35-39"'
            )
        if relative is not None and not _is_sensible(relative):
            raise QuantError(
                f'the rule for {self.pattern} has layers = "{self.layers}", must be one layer or more, or a '
                "fraction above 0 and at most 1"
            )
        if relative is None and any(low > high for low, high in _ranges(self.layers)):
            raise QuantError(
                f'the rule for {self.pattern} has layers = "{self.layers}", must count upwards, as in "0-4"'
            )

    @property
    def is_relative(self) -> bool:
        """Whether `layers` means something only once the number of layers is known."""
        return self.layers is not None and _RELATIVE.fullmatch(self.layers) is not None

    @property
    def is_vision(self) -> bool:
        """Whether `layers` counts blocks of the vision tower; else it counts layers of the decoder."""
        return self.pattern.startswith(_VISION)

    def matches(self, name: str) -> bool:
        """Whether the rule decides about the tensor of this name.

        Raises:
            QuantError: `layers` is relative and the pattern matches; use `Recipe.for_layers` before.
        """
        if not fnmatchcase(name, self.pattern):
            return False
        if self.layers is None:
            return True
        index = _layer_of(name)
        if index is None or name.startswith(_VISION) is not self.is_vision:
            return False
        if self.is_relative:
            raise QuantError(
                f'layers = "{self.layers}" of the rule for {self.pattern} needs the number of layers; '
                "call Recipe.for_layers first"
            )
        return any(low <= index <= high for low, high in _ranges(self.layers))

    def for_layers(self, *, decoder: int, vision: int) -> Rule:
        """The same rule with layer numbers, if `layers` is relative; else itself.

        Args:
            decoder: layers of the decoder.
            vision: blocks of the vision tower; counted from by patterns that begin with "model.visual.".

        Raises:
            QuantError: a layer number that is not there.
        """
        if self.layers is None:
            return self
        depth = vision if self.is_vision else decoder
        if not self.is_relative:
            if max(high for _, high in _ranges(self.layers)) >= depth:
                raise QuantError(
                    f'the rule for {self.pattern} has layers = "{self.layers}", but there are only {depth} '
                    f"layers, 0-{depth - 1}"
                )
            return self
        return replace(self, layers=_absolute(self.layers, depth))

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON values."""
        form = self.format
        stored: dict[str, Any] | None = None
        if isinstance(form, ChannelFormat):
            stored = {"bits": form.bits, "per": "channel", "groups": form.groups}
        elif form is not None:
            stored = {"bits": form.bits, "block_size": form.block_size, "symmetric": form.symmetric}
        return {"pattern": self.pattern, "format": stored, "layers": self.layers, "refine": self.refine}


def _layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, None if it is in no stack."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _is_sensible(relative: re.Match[str]) -> bool:
    """Whether 'first:N' and the like has an N that can mean at least one layer, and no more than all."""
    if relative[2] is not None:
        return int(relative[2]) > 0
    return 0 < int(relative[3]) <= int(relative[4])


def _ranges(layers: str) -> list[tuple[int, int]]:
    """'0-4,35' to [(0, 4), (35, 35)]."""
    pairs = [item.partition("-") for item in layers.split(",")]
    return [(int(low), int(high or low)) for low, _, high in pairs]


def _absolute(layers: str, depth: int) -> str:
    """'outer:1/8' of 40 to '0-4,35-39'."""
    match = _RELATIVE.fullmatch(layers)
    assert match is not None
    count = (
        int(match[2]) if match[2] is not None else math.ceil(Fraction(int(match[3]), int(match[4])) * depth)
    )
    count = min(count, depth)
    spans = []
    if match[1] in ("first", "outer"):
        spans.append(_span(0, count - 1))
    if match[1] in ("last", "outer"):
        spans.append(_span(depth - count, depth - 1))
    return ",".join(spans)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
