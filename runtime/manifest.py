"""manifest.json: all that the runtime knows of a model.

In: the JSON document of a bundle. Out: frozen dataclasses, checked on construction. The runtime takes
every name, shape, token id and pixel budget from here and has no other knowledge of model families.
Unknown keys, missing keys and values of a wrong type are errors: a manifest is ours, so it is either right
or damaged. The format is specified in docs/bundle.md and runtime/manifest.schema.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from autoglm_edge.errors import BundleError, RequestError

from .record import read_record

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PART_NAMES = ("decoder", "embedding", "vision")
KV_BYTES = {"float32": 4, "float16": 2, "int8": 1}
"""Bytes of a value by the dtype of the KV cache."""

OPTIONAL_PARTS = ("prefill", "layer")
"""Parts that a bundle may have on top: prefill, the decoder's layers in a form that reads prompts faster."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle.

    Attributes:
        path: relative to the bundle folder, no directories above it.
        size_bytes: exact size.
        sha256: lower-case hex digest of the whole file.
    """

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        pure = PurePosixPath(self.path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in self.path or not self.path:
            raise BundleError(f"{MANIFEST_NAME} names the file {self.path!r}, which lies outside the bundle")
        if self.size_bytes < 0:
            raise BundleError(f"{MANIFEST_NAME} gives {self.path} the size {self.size_bytes}")
        if not _is_sha256(self.sha256):
            raise BundleError(f"{MANIFEST_NAME} gives {self.path} a malformed SHA-256, {self.sha256!r}")


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        model: hub id or folder name of the checkpoint.
        revision: commit of a hub download, else None.
        config_sha256: digest of the checkpoint's config.json, byte for byte.
        parameters: number of weights in the checkpoint.
    """

    model: str
    revision: str | None
    config_sha256: str
    parameters: int

    def __post_init__(self) -> None:
        if not _is_sha256(self.config_sha256):
            raise BundleError(
                f"{MANIFEST_NAME}: source.config_sha256 is {self.config_sha256!r}, must be 64 hex digits"
            )
        _at_least(0, "source.", parameters=self.parameters)


@dataclass(frozen=True)
class Geometry:
    """Shapes of the graphs, in the letters of docs/glossary.md.

    Attributes:
        layers: L, decoder layers, hence pairs of KV inputs.
        hidden: C, width of inputs_embeds.
        heads: H, query heads.
        kv_heads: K, key/value heads.
        head_dim: D.
        vocab: V, width of the logits (padded; the tokenizer may know fewer ids).
        context_length: largest position the model was trained for.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context_length: int

    def __post_init__(self) -> None:
        _at_least(1, "geometry.", **dataclasses.asdict(self))


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes patches; the pixel budget counts every frame, and a still image has two.

    Attributes:
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch; a still image is repeated so often.
        merge_size: side of a merge block in patches; merge_size ** 2 patches become one token.
        min_pixels: least temporal_patch_size * height * width after resizing.
        max_pixels: most temporal_patch_size * height * width after resizing.
        mean: per channel (RGB), after rescaling.
        std: per channel (RGB), after rescaling.
        rescale_factor: multiplies the 0..255 values.
        resample: PIL resampling filter number (3 is bicubic).
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    resample: int

    def __post_init__(self) -> None:
        _at_least(
            1,
            "image.",
            patch_size=self.patch_size,
            temporal_patch_size=self.temporal_patch_size,
            merge_size=self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        if not all(map(math.isfinite, (*self.mean, *self.std, self.rescale_factor))) or 0 in self.std:
            raise BundleError(
                f"{MANIFEST_NAME}: image.mean {self.mean}, image.std {self.std} and image.rescale_factor "
                f"{self.rescale_factor} must be finite, and no std may be 0"
            )
        if self.resample not in range(6):
            raise BundleError(f"{MANIFEST_NAME}: image.resample is {self.resample}, must be 0 to 5")
        if not max(self.min_pixels, self.pixels_per_token) <= self.max_pixels:
            raise BundleError(
                f"{MANIFEST_NAME}: image.max_pixels is {self.max_pixels}, must be at least min_pixels "
                f"({self.min_pixels}) and one token ({self.pixels_per_token} pixels)"
            )

    @property
    def patch_dim(self) -> int:
        """Length of one row of pixel_values."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Budget that one image token costs: all frames of one merge block."""
        return self.temporal_patch_size * (self.patch_size * self.merge_size) ** 2

    @property
    def max_tokens(self) -> int:
        """The most tokens that one image can become."""
        return self.max_pixels // self.pixels_per_token

    def with_max_tokens(self, tokens: int) -> ImageSpec:
        """The same processor with a budget of `tokens` image tokens per picture.

        Raises:
            RequestError: the budget is below what the smallest picture needs.
        """
        least = -(-self.min_pixels // self.pixels_per_token)
        if tokens < least:
            raise RequestError(
                f"max_image_tokens is {tokens}, but this model's smallest picture needs {least}"
            )
        return dataclasses.replace(self, max_pixels=tokens * self.pixels_per_token)


@dataclass(frozen=True)
class TokenSpec:
    """Token ids with a meaning to the runtime.

    Attributes:
        eos: any of these ends generation and is not part of the text.
        pad: filler, or None.
        image: placeholder that image features replace.
        image_start: id before the placeholders of an image.
        image_end: id after them.
    """

    eos: tuple[int, ...]
    pad: int | None
    image: int
    image_start: int
    image_end: int

    def __post_init__(self) -> None:
        if not self.eos:
            raise BundleError(f"{MANIFEST_NAME}: tokens.eos is empty, so that no answer would ever end")
        _at_least(
            0,
            "tokens.",
            eos=min(self.eos),
            pad=self.pad or 0,
            image=self.image,
            image_start=self.image_start,
            image_end=self.image_end,
        )


@dataclass(frozen=True)
class Part:
    """One graph.

    Attributes:
        graph: file with the ONNX graph.
        data: file with its weights.
        weight_bytes: bytes of weights in the data file.
        integer: whether all its products of quantized matrices are of bytes with scales per token and channel
            (MatMulIntegerToFloat), and none is of blocks (MatMulNBits). Such a graph may be opened without
            packing its weights, and needs a processor whose products of uint8 and int8 are exact. Not in the
            document if false.
    """

    graph: str
    data: str
    weight_bytes: int
    integer: bool = False

    def __post_init__(self) -> None:
        _at_least(0, "parts.", weight_bytes=self.weight_bytes)


@dataclass(frozen=True)
class Calibration:
    """The inputs that weights were rounded for, or scales of the cache measured on.

    Attributes:
        sha256: of the token ids, positions and patches that were run.
        prompts: how many, each with its answer.
        tokens: of all of them.
    """

    sha256: str
    prompts: int
    tokens: int

    def __post_init__(self) -> None:
        if not _is_sha256(self.sha256):
            raise BundleError(
                f"{MANIFEST_NAME}: calibration.sha256 is {self.sha256!r}, must be 64 hex digits"
            )
        _at_least(1, "calibration.", prompts=self.prompts, tokens=self.tokens)


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json.

    Attributes:
        format_version: 1.
        created_by: "autoglm-edge X.Y.Z".
        tools: versions of the packages that wrote the graphs.
        source: the checkpoint.
        geometry: shapes.
        image: image processor.
        tokens: special ids.
        recipe: the recipe as written by quantize.recipe (its name, and the rules in order).
        activations: dtype of the hidden states: "float32" or "float16".
        kv_dtype: dtype of the KV inputs: that of the activations, or "int8".
        kv_bytes_per_token: bytes that one token adds to the cache, all layers.
        parts: decoder, embedding and vision, and optionally prefill.
        generation: sampling defaults of the checkpoint (temperature, top_p, ...), as far as it gives any.
        files: every file of the bundle but the manifest itself.
        figures: measured parity and memory of exactly these files; empty until measured.
        calibration: what the weights were rounded for; None, and not in the document, if for nothing.
        kv_calibration: what the scales of an int8 cache were measured on; None, and not in the document, for
            a cache of floats.
    """

    format_version: int
    created_by: str
    tools: dict[str, str]
    source: Source
    geometry: Geometry
    image: ImageSpec
    tokens: TokenSpec
    recipe: dict[str, Any]
    activations: str
    kv_dtype: str
    kv_bytes_per_token: int
    parts: dict[str, Part]
    generation: dict[str, float]
    files: tuple[FileEntry, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    kv_calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME} has format version {self.format_version}, this release reads "
                f"{FORMAT_VERSION}; export the checkpoint again with this release"
            )
        if not set(PART_NAMES) <= set(self.parts) <= {*PART_NAMES, *OPTIONAL_PARTS}:
            raise BundleError(
                f"{MANIFEST_NAME} lists the parts {sorted(self.parts)}, must be {sorted(PART_NAMES)}, "
                f"optionally with {', '.join(OPTIONAL_PARTS)}"
            )
        if self.activations not in ("float32", "float16"):
            raise BundleError(
                f"{MANIFEST_NAME} names the dtype {self.activations!r} for activations, must be float32 or "
                "float16"
            )
        if self.kv_dtype not in KV_BYTES:
            raise BundleError(
                f"{MANIFEST_NAME} names the dtype {self.kv_dtype!r} for the KV cache, must be one of "
                f"{', '.join(KV_BYTES)}"
            )
        if (self.kv_calibration is not None) is not (self.kv_dtype == "int8"):
            raise BundleError(
                f"{MANIFEST_NAME}: kv_calibration belongs to a KV cache in int8, but kv_dtype is "
                f"{self.kv_dtype!r} and kv_calibration is {'there' if self.kv_calibration else 'missing'}"
            )
        _at_least(1, "", kv_bytes_per_token=self.kv_bytes_per_token)
        pictures = (self.tokens.image, self.tokens.image_start, self.tokens.image_end)
        if len(set(pictures)) < len(pictures):
            raise BundleError(
                f"{MANIFEST_NAME}: tokens.image, .image_start and .image_end are {pictures}, must differ"
            )
        paths = [entry.path for entry in self.files]
        if len(set(paths)) != len(paths):
            raise BundleError(f"{MANIFEST_NAME} lists a file twice")
        for name, part in self.parts.items():
            for path in (part.graph, part.data):
                if path not in paths:
                    raise BundleError(
                        f"{MANIFEST_NAME}: part {name} needs {path}, which is not among its files"
                    )

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size_bytes for entry in self.files)

    def to_json(self) -> str:
        """The document, stable in its order, ending in a newline."""
        document = dataclasses.asdict(self)
        for name in ("calibration", "kv_calibration"):
            if document[name] is None:
                del document[name]
        for part in document["parts"].values():
            if not part["integer"]:
                del part["integer"]
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read and check a document.

        Raises:
            BundleError: not JSON, a key too many or missing, a value of a wrong type or out of range.
        """
        try:
            document = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST_NAME} is not JSON ({error}); export the checkpoint again"
            ) from error
        try:
            return read_record(cls, document, MANIFEST_NAME)
        except ValueError as error:
            raise BundleError(f"{error}; export the checkpoint again with this release") from error


def _finite(text: str) -> float:
    """A number of the document; NaN and Infinity are no JSON, and 1e999 means nothing here either."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def _at_least(least: int, where: str, **values: int) -> None:
    """Refuse the first value that is smaller; `where` goes before its name."""
    for name, value in values.items():
        if value < least:
            raise BundleError(f"{MANIFEST_NAME}: {where}{name} is {value}, must be at least {least}")
