"""A prompt and what the original model makes of it, and what that model was.

In: nothing; the recorder makes them, and `reference.py` reads them from a file. Out: `Fingerprint` and
`Case`, frozen. Knows nothing of files and of engines.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.runtime.manifest import ImageSpec
from autoglm_edge.runtime.prompt.image import PatchedImage, load_image
from autoglm_edge.runtime.prompt.template import ImageLayout

from .rows import Rows

FEATURE_ROWS = 256
"""Vision features kept per image, evenly spaced: a displaced or wrong row shows in any sample."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Fingerprint:
    """What was recorded, with what.

    Attributes:
        model: hub id or folder name of the checkpoint.
        revision: commit of a hub download, else None.
        config_sha256: of config.json, byte for byte.
        weights_sha256: over the digests of the weight files, in the order of their names.
        tokenizer_sha256: of tokenizer.json, byte for byte.
        template_sha256: of the chat template, UTF-8.
        image: image processor with its pixel budget.
        image_layout: what stands between picture and text; see runtime.template.
        vocab: V.
        device: "cpu", or the name of the accelerator.
        dtype: of weights and activations.
        baseline: "bnb-nf4" or "bnb-int8" if the weights were quantized on loading, else None.
        prompt_set: "small", "full" or the name of a file.
        seed: of the prompt set.
        versions: of the packages that computed.
    """

    model: str
    revision: str | None
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str
    template_sha256: str
    image: ImageSpec
    image_layout: ImageLayout
    vocab: int
    device: str
    dtype: str
    baseline: str | None
    prompt_set: str
    seed: int
    versions: dict[str, str]

    @property
    def title(self) -> str:
        """In a few words: "float32 on cpu" or "bnb-nf4, bfloat16 on cuda"."""
        return f"{self.baseline + ', ' if self.baseline else ''}{self.dtype} on {self.device}"


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt and what the model makes of it.

    Attributes:
        name: "tap-en-03"; what stands before the first hyphen is its group.
        messages: as sent; an image part is {"type": "image", "image": index}.
        images: PNG files, in prompt order.
        box: what a tap should hit, (x0, y0, x1, y1) in 0..999, or None.
        max_tokens: limit of the answer.
        ids: (T,) int64 prompt, placeholders expanded.
        positions: (3, T) int64 as the model computes them.
        grids: per image (1, h, w) in patches.
        patches_sha256: per image, of pixel_values as float32 little-endian.
        answer: (m,) int64 continuation that was scored, end token included if it came.
        greedy: (g,) int64, the model's own greedy answer; equal to `answer` unless recorded along another
            reference.
        places: (n,) int64, scored positions in ids + answer, ascending; the next token is at place + 1.
        rows: the scores at these places.
        features: per image (indices (f,), values (f, C) float32) of its vision tokens.
    """

    name: str
    messages: tuple[dict[str, Any], ...]
    images: tuple[bytes, ...]
    box: Box | None
    max_tokens: int
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    grids: tuple[tuple[int, int, int], ...]
    patches_sha256: tuple[str, ...]
    answer: NDArray[np.int64]
    greedy: NDArray[np.int64]
    places: NDArray[np.int64]
    rows: Rows
    features: tuple[tuple[NDArray[np.int64], NDArray[np.float32]], ...]

    @property
    def group(self) -> str:
        """Kind of prompt: "text", "image", "tap", ..."""
        return self.name.partition("-")[0]

    @property
    def sequence(self) -> NDArray[np.int64]:
        """(T + m,) prompt and answer."""
        return np.concatenate([self.ids, self.answer])

    @property
    def in_answer(self) -> NDArray[np.bool_]:
        """(n,) whether the token that comes next is one of the answer."""
        result: NDArray[np.bool_] = self.places >= len(self.ids) - 1
        return result

    def pictures(self) -> list[Image.Image]:
        """The images, decoded.

        Raises:
            ImageError: one is damaged.
        """
        return [load_image(png) for png in self.images]

    def chat_messages(self) -> list[dict[str, Any]]:
        """The messages with the pictures in their places, as `Engine.chat` takes them."""
        pictures = self.pictures()

        def fill(part: Any) -> Any:
            if isinstance(part, dict) and part.get("type") == "image":
                return {"type": "image", "image": pictures[part["image"]]}
            return part

        return [
            {**message, "content": [fill(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in self.messages
        ]


def sample_rows(count: int) -> NDArray[np.int64]:
    """Which of `count` vision tokens are kept: at most FEATURE_ROWS, evenly spaced, both ends included."""
    if count <= FEATURE_ROWS:
        return np.arange(count)
    return np.round(np.linspace(0, count - 1, FEATURE_ROWS)).astype(np.int64)


def patches_sha256(image: PatchedImage) -> str:
    """Digest of what the vision tower sees: pixel_values as float32 little-endian."""
    return hashlib.sha256(np.ascontiguousarray(image.pixel_values, "<f4").tobytes()).hexdigest()
