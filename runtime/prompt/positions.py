"""Three-axis positions of a prompt with images (multimodal rope).

In: token ids with one placeholder per image token, and the grids of the images. Out: a time, height and
width position per token, and the position of the first generated token. Knows nothing of pixels or text.

Source of the rule: `get_rope_index` of transformers' modeling_glm4v. Text counts up by one on all axes. An
image that starts at p has time p throughout, height p + row and width p + column over its merged grid
(H, W), row by row; what follows goes on at p + max(H, W), not at p + H * W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoglm_edge.errors import PromptError


def image_positions(
    ids: ArrayLike, grids: Sequence[tuple[int, int, int]], image_token: int, merge_size: int
) -> tuple[NDArray[np.int64], int]:
    """Positions of every token of a prompt.

    Images may stand next to each other without a token between them; each takes as many placeholders as its
    grid has tokens. (transformers fails there: it takes the run for one image.)

    Args:
        ids: (T,) token ids, each image expanded to N placeholders.
        grids: per image (1, h, w) in patches, in prompt order.
        image_token: id of the placeholder.
        merge_size: side of a merge block in patches; h and w are multiples of it.

    Returns:
        (3, T) int64 positions in the order time, height, width; and the position that the next token, which
        is text, has on all axes.

    Raises:
        PromptError: placeholders and grids disagree in number, an image is interrupted by other tokens, or a
            grid is not that of a still image.
    """
    array = np.asarray(ids)
    if array.ndim != 1:
        raise PromptError(f"token ids have the shape {array.shape}, must have one dimension")
    sizes = [_merged_size(grid, merge_size, index) for index, grid in enumerate(grids)]
    places = np.flatnonzero(array == image_token)
    wanted = sum(height * width for height, width in sizes)
    if places.size != wanted:
        raise PromptError(
            f"the prompt has {places.size} image placeholders, its {len(sizes)} images need {wanted}; "
            "expand one placeholder per image token"
        )

    length = array.shape[0]
    positions = np.empty((3, length), dtype=np.int64)
    position, done, used = 0, 0, 0  # next position, tokens placed, placeholders used
    for index, (height, width) in enumerate(sizes):
        count = height * width
        start, end = int(places[used]), int(places[used + count - 1]) + 1
        if end - start != count:
            raise PromptError(f"image {index} has {count} placeholders that other tokens interrupt")
        positions[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        positions[0, start:end] = position
        positions[1, start:end] = position + np.repeat(np.arange(height), width)
        positions[2, start:end] = position + np.tile(np.arange(width), height)
        position += max(height, width)
        done, used = end, used + count
    positions[:, done:] = np.arange(position, position + length - done)
    return positions, position + length - done


def _merged_size(grid: tuple[int, int, int], merge_size: int, index: int) -> tuple[int, int]:
    frames, height, width = (int(value) for value in grid)
    if frames != 1 or height < 1 or width < 1 or height % merge_size or width % merge_size:
        raise PromptError(
            f"image {index} has the grid {(frames, height, width)}, must be one frame and sides that are "
            f"multiples of {merge_size}"
        )
    return height // merge_size, width // merge_size
