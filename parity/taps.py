"""Action parity: does the candidate's answer make the phone do the same?

In: two answers as text, the size of the screen and the box to hit. Out: `ActionOutcome`s and their counts.
Actions are read by the runtime's own parser, which has the rules of the phone agent's client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoglm_edge.runtime.actions import Action, Point, parse_action, to_pixels

from .metrics import Share, Spread, point_distance

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ActionOutcome:
    """One prompt whose reference answer holds an action.

    Attributes:
        case: name of the prompt.
        reference: the action as text.
        candidate: the candidate's, "" if its answer holds none.
        same_kind: the same kind of action.
        same_arguments: the same kind with the same arguments.
        reference_point: where the reference touches, 0..999, or None.
        candidate_point: where the candidate touches, or None.
        distance: between the two in thousandths of the sides; nan if one is missing.
        distance_pixels: the same in pixels of the picture; nan without one.
        reference_hits: whether the reference hits the box; None without a box.
        candidate_hits: whether the candidate does.
    """

    case: str
    reference: str
    candidate: str
    same_kind: bool
    same_arguments: bool
    reference_point: Point | None
    candidate_point: Point | None
    distance: float
    distance_pixels: float
    reference_hits: bool | None
    candidate_hits: bool | None


@dataclass(frozen=True)
class ActionFigures:
    """All outcomes, counted.

    Attributes:
        kinds: same kind of action.
        arguments: same kind and arguments.
        distance: of points, in thousandths.
        distance_pixels: of points, in pixels.
        reference_hits: taps of the reference in the box.
        candidate_hits: taps of the candidate in the box.
        lost: taps in the box by the reference, but not by the candidate, among the former.
        outcomes: each.
    """

    kinds: Share
    arguments: Share
    distance: Spread
    distance_pixels: Spread
    reference_hits: Share
    candidate_hits: Share
    lost: Share
    outcomes: tuple[ActionOutcome, ...]

    @classmethod
    def of(cls, outcomes: Sequence[ActionOutcome]) -> ActionFigures:
        """Count outcomes."""
        boxed = [item for item in outcomes if item.reference_hits is not None]
        held = [item for item in boxed if item.reference_hits]
        distances = np.array([(i.distance, i.distance_pixels) for i in outcomes]).reshape(-1, 2)
        return cls(
            Share(sum(item.same_kind for item in outcomes), len(outcomes)),
            Share(sum(item.same_arguments for item in outcomes), len(outcomes)),
            Spread.of(distances[~np.isnan(distances[:, 0]), 0]),
            Spread.of(distances[~np.isnan(distances[:, 1]), 1]),
            Share(len(held), len(boxed)),
            Share(sum(bool(item.candidate_hits) for item in boxed), len(boxed)),
            Share(sum(not item.candidate_hits for item in held), len(held)),
            tuple(outcomes),
        )


def compare_actions(
    case: str, reference: str, candidate: str, *, size: tuple[int, int] | None, box: Box | None
) -> ActionOutcome | None:
    """Compare two answers; None if the reference's holds no action, which leaves nothing to compare.

    Args:
        case: name of the prompt.
        reference: answer of the reference.
        candidate: answer of the candidate.
        size: width and height of the last picture in pixels, or None.
        box: what should be touched, in 0..999, or None.
    """
    first, second = parse_action(reference), parse_action(candidate)
    if first is None:
        return None
    a, b = first.element, None if second is None else second.element
    distance = distance_pixels = math.nan
    if a is not None and b is not None:
        distance = point_distance(a, b)
        if size is not None:
            distance_pixels = point_distance(to_pixels(a, size), to_pixels(b, size))
    same_kind = second is not None and first.kind == second.kind
    return ActionOutcome(
        case,
        str(first),
        "" if second is None else str(second),
        same_kind,
        same_kind and _arguments(first) == _arguments(second),
        a,
        b,
        distance,
        distance_pixels,
        None if box is None else is_inside(a, box),
        None if box is None else same_kind and is_inside(b, box),
    )


def is_inside(point: Point | None, box: Box) -> bool:
    """Whether a point lies in a box, borders included."""
    return point is not None and box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _arguments(action: Action | None) -> dict[str, object]:
    return {} if action is None else dict(action.arguments)
