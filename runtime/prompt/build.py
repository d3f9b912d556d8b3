"""The prompt of one answer: ids, images and positions, ready for the graphs.

In: messages, the bundle's tokenizer, template and specs. Out: Prompt. Knows nothing of graphs or caches.

Special tokens in the text of a message: the tokenizer would read a literal `<|image|>` or `<|user|>` as the
token (as transformers does by default), so whoever can write into a message, a web page or an app on the
screen included, could end the user's turn or displace an image. Such text is refused with PromptError, which
names the token; it is looked for in ids, not in characters, so that no spelling of it gets through, and over
adjacent parts together. The tags of thinking and answer (ALLOWED_TAGS) are ordinary history of an assistant
and stay allowed, even where a tokenizer marks them special. Every other text gives the ids of transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from autoglm_edge.errors import BundleError, ContextLengthError, PromptError
from autoglm_edge.runtime.manifest import ImageSpec, TokenSpec

from .image import PatchedImage, count_tokens, fit_grid, load_image, patchify
from .messages import Message, TextPart
from .positions import image_positions
from .template import ChatTemplate, ImageLayout
from .tokenizer import Tokenizer

ALLOWED_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the engine runs.

    Attributes:
        ids: (T,) int64, one placeholder per image token.
        images: in prompt order; their tokens sum to the placeholders in ids.
        positions: (3, T) int64, time, height and width.
        next_position: position of the first generated token on all axes.
        text: the rendered template, one placeholder per image; empty for a prompt made of ids.
    """

    ids: NDArray[np.int64]
    images: tuple[PatchedImage, ...]
    positions: NDArray[np.int64]
    next_position: int
    text: str

    @property
    def image_tokens(self) -> int:
        """Placeholders in ids."""
        return sum(image.tokens for image in self.images)


def build_prompt(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image: ImageSpec,
    tokens: TokenSpec,
    image_layout: ImageLayout = "plain",
    variables: Mapping[str, Any] | None = None,
    context: int | None = None,
    max_tokens: int = 1,
) -> Prompt:
    """Render, tokenise, cut images into patches and lay out positions.

    Args:
        messages: as from read_messages.
        tokenizer: of the bundle.
        template: of the bundle.
        image: the image processor; its max_pixels bounds every image.
        tokens: special ids.
        image_layout: see template.py.
        variables: more variables for the template.
        context: tokens that prompt and answer may have together; None for no limit. Checked from the sizes of
            the images, before any of them is resized.
        max_tokens: answer tokens to leave room for.

    Raises:
        PromptError: special tokens in a text, or the template cannot render the messages.
        ImageError: an image has impossible sides.
        ContextLengthError: more tokens than `context`.
    """
    text, ids = _lay_out(messages, tokenizer, template, image, tokens, image_layout, variables)
    if context is not None and ids.size + max_tokens > context:
        raise ContextLengthError(int(ids.size), max_tokens, context)
    pictures = [picture for message in messages for picture in message.images]
    return _assemble(ids, tuple(patchify(picture, image) for picture in pictures), image, tokens, text)


def prompt_ids(
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image: ImageSpec,
    tokens: TokenSpec,
    image_layout: ImageLayout = "plain",
    variables: Mapping[str, Any] | None = None,
) -> NDArray[np.int64]:
    """The (T,) ids that build_prompt gives, without touching the pictures.

    Raises:
        PromptError: as build_prompt.
        ImageError: as build_prompt.
    """
    return _lay_out(messages, tokenizer, template, image, tokens, image_layout, variables)[1]


def prompt_from_ids(
    ids: ArrayLike,
    images: Sequence[Image.Image | bytes | str | Path] = (),
    *,
    image: ImageSpec,
    tokens: TokenSpec,
) -> Prompt:
    """A prompt of given ids, for scoring. Special tokens in it are the caller's own and are kept.

    Args:
        ids: (T,) integers, with either one placeholder per image or one per image token.
        images: in prompt order; anything that load_image takes.
        image: the image processor.
        tokens: special ids.

    Raises:
        PromptError: not a list of ids, or placeholders that fit neither form.
        ImageError: an image cannot be used.
    """
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError) as error:  # rows of different lengths, or something that is no array
        raise PromptError(f"token ids are no list of integers ({error})") from error
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise PromptError(
            f"token ids are {array.dtype} of the shape {array.shape}, must be a non-empty list of integers"
        )
    if array.min() < 0:
        raise PromptError(f"token ids hold {array.min()}, must not be negative")
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes, bytearray)):
        raise PromptError(f"images is {type(images).__name__}, must be a list of images")
    array = array.astype(np.int64)
    patched = tuple(patchify(load_image(picture), image) for picture in images)
    counts = [picture.tokens for picture in patched]
    if np.count_nonzero(array == tokens.image) != sum(counts):
        array = _expand(array, counts, tokens.image)
    return _assemble(array, patched, image, tokens, "")


def _lay_out(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    image: ImageSpec,
    tokens: TokenSpec,
    image_layout: ImageLayout,
    variables: Mapping[str, Any] | None,
) -> tuple[str, NDArray[np.int64]]:
    """Rendered text and (T,) expanded ids; of the pictures only their sizes are read."""
    _refuse_special_tokens(messages, tokenizer, tokens)
    text = template.render(
        messages,
        image_layout=image_layout,
        variables=variables,
        image_tokens=_image_tokens(tokenizer, tokens),
    )
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    if ids.size == 0:
        raise PromptError("the chat template made an empty prompt of the messages")
    pictures = [picture for message in messages for picture in message.images]
    grids = [fit_grid(picture.height, picture.width, image) for picture in pictures]
    return text, _expand(ids, [count_tokens(grid, image) for grid in grids], tokens.image)


def _image_tokens(tokenizer: Tokenizer, tokens: TokenSpec) -> tuple[str, str, str]:
    ids = (tokens.image_start, tokens.image, tokens.image_end)
    start, placeholder, end = (tokenizer.token_of(index) for index in ids)
    if start is None or placeholder is None or end is None:
        raise BundleError(
            f"an image token of {ids} is not among the {tokenizer.vocab_size} ids of the tokenizer; "
            "export the checkpoint again"
        )
    return start, placeholder, end


def _assemble(
    ids: NDArray[np.int64], images: tuple[PatchedImage, ...], image: ImageSpec, tokens: TokenSpec, text: str
) -> Prompt:
    grids = [picture.grid for picture in images]
    positions, next_position = image_positions(ids, grids, tokens.image, image.merge_size)
    return Prompt(ids, images, positions, next_position, text)


def _expand(ids: NDArray[np.int64], counts: Sequence[int], image_token: int) -> NDArray[np.int64]:
    """Repeat the i-th placeholder counts[i] times."""
    places = np.flatnonzero(ids == image_token)
    if places.size != len(counts):
        raise PromptError(
            f"the prompt has {places.size} image placeholders for {len(counts)} images; "
            f"write one per image, or {sum(counts)}, one per image token"
        )
    repeats = np.ones(ids.size, dtype=np.int64)
    repeats[places] = counts
    return np.repeat(ids, repeats)


def _refuse_special_tokens(messages: Sequence[Message], tokenizer: Tokenizer, tokens: TokenSpec) -> None:
    structural = {tokens.image, tokens.image_start, tokens.image_end, *tokens.eos}  # special or not
    refused = (tokenizer.special_ids | structural) - {tokenizer.id_of(tag) for tag in ALLOWED_TAGS}
    for index, message in enumerate(messages):
        for is_text, run in itertools.groupby(message.parts, lambda part: isinstance(part, TextPart)):
            if not is_text:
                continue
            # Adjacent parts are printed without a gap, so a token split over two of them counts too.
            joined = "".join(part.text for part in run if isinstance(part, TextPart))
            found = refused.intersection(tokenizer.encode(joined))
            if found:
                raise PromptError(
                    f"messages[{index}] holds the token {tokenizer.token_of(min(found))!r} in its text, "
                    "which would change the structure of the prompt; remove it or put a space into it"
                )
