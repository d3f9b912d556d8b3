from __future__ import annotations

import numpy as np
import pytest
from front_fixtures import reference_positions
from hypothesis import given, settings
from hypothesis import strategies as st

from autoglm_edge.errors import PromptError
from autoglm_edge.runtime.prompt.positions import image_positions

IMAGE, TEXT = 7, 1


def sequence(*items: int | tuple[int, int]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Numbers are runs of text, pairs are images of that merged grid."""
    ids: list[int] = []
    grids: list[tuple[int, int, int]] = []
    for item in items:
        if isinstance(item, int):
            ids += [TEXT] * item
        else:
            ids += [IMAGE] * (item[0] * item[1])
            grids.append((1, item[0] * 2, item[1] * 2))
    return np.array(ids), grids


@pytest.mark.parametrize(
    "items",
    [
        (5,),
        (4, (3, 2), 6),
        ((3, 2), 6),
        (4, (2, 5)),
        ((1, 1),),
        (3, (86, 39), 9),
        (4, (3, 2), 1, (1, 8), 2, (5, 5), 3),
        ((2, 2), 1, (4, 1)),
    ],
    ids=["text", "middle", "start", "end", "alone", "screenshot", "three", "start and end"],
)
def test_positions_equal_those_of_transformers(items: tuple[int | tuple[int, int], ...]) -> None:
    ids, grids = sequence(*items)
    wanted, wanted_next = reference_positions(ids, grids, IMAGE, 2)
    got, got_next = image_positions(ids, grids, IMAGE, 2)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, wanted)
    assert got_next == wanted_next


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)), max_size=4),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3]),
)
def test_any_mix_of_text_and_images_has_the_positions_of_transformers(
    images: list[tuple[int, int, int]], tail: int, merge: int
) -> None:
    ids: list[int] = []
    for gap, height, width in images:
        ids += [TEXT] * gap + [IMAGE] * (height * width)
    array = np.array(ids + [TEXT] * tail)
    grids = [(1, height * merge, width * merge) for _, height, width in images]
    wanted, wanted_next = reference_positions(array, grids, IMAGE, merge)
    got, got_next = image_positions(array, grids, IMAGE, merge)
    np.testing.assert_array_equal(got, wanted)
    assert got_next == wanted_next


def test_an_image_advances_by_its_longer_side_only() -> None:
    positions, following = image_positions(*sequence(2, (2, 3), 1), IMAGE, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_adjacent_images_are_told_apart_by_their_grids() -> None:
    together, following = image_positions(*sequence(1, (2, 2), (1, 3), 1), IMAGE, 2)
    apart, _ = image_positions(*sequence(1, (2, 2)), IMAGE, 2)
    np.testing.assert_array_equal(together[:, :5], apart)
    assert together[:, 5:].tolist() == [[3, 3, 3, 6], [3, 3, 3, 6], [3, 4, 5, 6]]
    assert following == 7


def test_an_empty_prompt_has_no_positions() -> None:
    positions, following = image_positions(np.zeros(0, dtype=np.int64), [], IMAGE, 2)
    assert positions.shape == (3, 0)
    assert following == 0


@pytest.mark.parametrize("grids", [[], [(1, 4, 4)], [(1, 4, 6), (1, 2, 2)]])
def test_placeholders_that_disagree_with_the_grids_are_refused(grids: list[tuple[int, int, int]]) -> None:
    ids, _ = sequence(2, (2, 3), 1)
    with pytest.raises(PromptError, match="has 6 image placeholders"):
        image_positions(ids, grids, IMAGE, 2)


def test_an_image_interrupted_by_text_is_refused() -> None:
    ids, _ = sequence(2, (1, 2), 1, (1, 2), 1)
    with pytest.raises(PromptError, match="interrupt"):
        image_positions(ids, [(1, 4, 4)], IMAGE, 2)


@pytest.mark.parametrize("grid", [(2, 4, 4), (1, 3, 4), (1, 4, 5), (1, 0, 4), (1, 4, -4)])
def test_a_grid_of_no_still_image_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(PromptError, match="grid"):
        image_positions([TEXT], [grid], IMAGE, 2)


def test_ids_of_two_dimensions_are_refused() -> None:
    with pytest.raises(PromptError, match="one dimension"):
        image_positions([[1, 2]], [], IMAGE, 2)
