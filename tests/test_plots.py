"""Plots: well-formed, escaped, within their frame, and with names that can be read."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from autoglm_edge.parity.plots import Bar, Line, Move, Strip, bars, log_lines, moves, strips
from autoglm_edge.parity.scatter import SideScale, Spot, frontier, place_labels, scatter

SIDE = SideScale(("known", "values"), ((0.001, "Q8"), (0.07, "Q4"), (0.09, "Q3")))


def draw(spots: list[Spot], **options: object) -> ElementTree.Element:
    """The parsed plot."""
    arguments: dict[str, object] = {"x_label": "bytes", "y_label": "KL", "lowest": 1e-6, **options}
    return ElementTree.fromstring(scatter(spots, **arguments))  # type: ignore[arg-type]


def words(plot: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in plot.iter() if element.tag.endswith("text")]


@pytest.mark.parametrize(
    "plot",
    [
        log_lines(["50 %", "<max>"], [Line("a & b", "#000", (0.1, 0.0))], marks=[(0.01, "<limit>")]),
        bars([Bar("<b>", 0.2, "&"), Bar("none", 0.0, "0")], log=True),
        strips([Strip("<s>", 3, 5, False, "parts")]),
        moves([Move((1, 2), (1, 2), True), Move((5, 5), (9, 9), False), Move((1, 2), (1, 2), False)]),
        scatter([Spot("<x>", 3, 1e-3, 1e-4)], x_label="<", y_label="&", lowest=1e-6, side=SIDE),
    ],
)
def test_every_plot_is_well_formed_whatever_names_hold(plot: str) -> None:
    ElementTree.fromstring(plot)

    assert "<script" not in plot
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", plot)


def test_touches_that_agree_are_drawn_once_and_those_that_moved_each() -> None:
    same = [Move((100, 200), (100, 200), True)] * 900
    picture = moves([*same, Move((5, 5), (9, 9), False)])

    assert len(picture) < 2000
    assert picture.count("h0") == 3  # ring, its inside, dot
    assert picture.count("<circle") == 2


def test_an_agreed_touch_outside_the_box_is_red() -> None:
    assert "#dc2626" in moves([Move((1, 1), (1, 1), False)])
    assert "#dc2626" not in moves([Move((1, 1), (1, 1), None), Move((1, 1), (1, 1), True)])


def test_the_frontier_keeps_what_nothing_beats() -> None:
    spots = [Spot(name, x, y) for name, x, y in [("a", 1, 9), ("b", 2, 5), ("c", 3, 6), ("d", 4, 1)]]

    assert [spot.name for spot in frontier(spots)] == ["a", "b", "d"]
    assert [spot.name for spot in frontier([*spots, Spot("tie", 2, 5)])] == ["a", "b", "d"]
    assert frontier([]) == []


def test_points_lie_by_size_and_by_order_of_magnitude() -> None:
    plot = draw([Spot("small", 2, 1e-2), Spot("large", 8, 1e-4)])
    dots = [element for element in plot.iter() if element.tag.endswith("circle")]
    (x0, y0), (x1, y1) = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in dots]

    assert x0 < x1
    assert y0 < y1  # worse is higher


def test_a_point_below_the_axis_is_a_triangle_on_its_end() -> None:
    plot = draw([Spot("fp32", 9, 1e-13), Spot("int4", 3, 1e-3)])
    triangles = [element for element in plot.iter() if element.attrib.get("d", "").startswith("M")]

    assert len(triangles) == 1
    assert {"fp32", "int4"} <= set(words(plot))


def test_the_side_scale_is_on_the_axis_of_the_points() -> None:
    plot = draw([Spot("same as Q8", 3, 0.001), Spot("x", 4, 1e-5)], side=SIDE)
    dot = next(element for element in plot.iter() if element.tag.endswith("circle"))
    ticks = [element for element in plot.iter() if element.tag.endswith("line")]

    assert {"Q8", "Q4", "Q3", "known", "values"} <= set(words(plot))
    assert any(math.isclose(float(tick.attrib["y1"]), float(dot.attrib["cy"])) for tick in ticks)


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_names_of_crowded_points_cover_neither_each_other_nor_points(count: int) -> None:
    rng = np.random.default_rng(count)
    places = [(float(x), float(y)) for x, y in rng.uniform((200, 150), (420, 330), (count, 2))]
    names = [f"int{n}-mixed" for n in range(count)]

    found = place_labels(names, places, (60, 50, 690, 500))

    boxes = []
    for name, (x, y, anchor) in zip(names, found, strict=True):
        start = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * 7 * len(name)
        boxes.append((start, y - 11, start + 7 * len(name), y + 3))
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for box, (px, py) in itertools.product(boxes, places):
        assert not (box[0] < px < box[2] and box[1] < py < box[3])


def test_names_stay_inside_the_frame_at_its_edges() -> None:
    area = (60.0, 50.0, 690.0, 500.0)
    found = place_labels(["a long name"] * 2, [(685, 60), (64, 495)], area)

    assert found[0][2] == "end"
    assert found[1][2] == "start"
