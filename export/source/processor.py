"""The image processor of a checkpoint: which settings it has, where they lie, what they mean.

In: preprocessor_config.json, or the part of processor_config.json where transformers 5 may keep them. Out:
`ImageSpec`; or the file again, with another pixel budget. Absent keys mean what transformers takes them for
(`image_processing_glm4v.py`). Knows nothing of pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.files import PREPROCESSOR_NAME, PROCESSOR_NAME, json_object, read_json
from autoglm_edge.export.settings import MAX_NUMBER, Settings
from autoglm_edge.runtime.manifest import ImageSpec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_MIN_PIXELS = 112 * 112
DEFAULT_MAX_PIXELS = 28 * 28 * 15000
"""What transformers' processor takes when its settings name no size; published checkpoints name one."""


def processor_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Settings of the image processor and the file they lie in; transformers 5 may nest them."""
    processor = folder / PROCESSOR_NAME
    if processor.exists():
        nested = read_json(processor).get("image_processor")
        if isinstance(nested, dict):
            return nested, PROCESSOR_NAME
    if not (folder / PREPROCESSOR_NAME).exists():
        raise CheckpointError(
            f"{folder} lacks {PREPROCESSOR_NAME}, which says how images become patches; download it with the "
            "checkpoint"
        )
    return read_json(folder / PREPROCESSOR_NAME), PREPROCESSOR_NAME


def image_spec(settings: Settings) -> ImageSpec:
    """What the settings of an image processor mean.

    Raises:
        CheckpointError: another processor, or a value that is of a wrong type or contradicts another.
    """
    name, values = settings.places[0]
    kind = settings.find("image_processor_type", "Glm4vImageProcessor")
    if not isinstance(kind, str) or not kind.startswith("Glm4vImageProcessor"):
        raise CheckpointError(
            f"{name} gives image_processor_type {kind!r}; only Glm4vImageProcessor is supported"
        )
    if not settings.flag("do_resize", True):
        raise CheckpointError(
            f"{name} gives do_resize false; images must be resized to whole patches, so set it to true"
        )
    size = values.get("size") or {}
    if not isinstance(size, dict):
        raise CheckpointError(
            f"{name} gives size {size!r}, must be an object with shortest_edge and longest_edge"
        )
    if size and not {"shortest_edge", "longest_edge"} <= set(size):
        raise CheckpointError(f"{name} gives size {size}, must have the keys shortest_edge and longest_edge")
    if size:  # keys of older processors beside it have no effect there either
        edges = Settings(((f"{name}, size,", size),))
        least, most = edges.integer("shortest_edge", 0), edges.integer("longest_edge", 0)
    else:
        least = settings.integer("min_pixels", DEFAULT_MIN_PIXELS)
        most = settings.integer("max_pixels", DEFAULT_MAX_PIXELS)
    rescale, normalize = settings.flag("do_rescale", True), settings.flag("do_normalize", True)
    resample = settings.integer("resample", 3, least=0)
    if resample > 5:
        raise CheckpointError(f"{name} gives resample {resample}, must be a PIL filter number from 0 to 5")
    std = _channels(settings, "image_std", CLIP_STD) if normalize else (1.0, 1.0, 1.0)
    if 0.0 in std:
        raise CheckpointError(f"{name} gives image_std {list(std)}, must not hold 0")
    patch = settings.integer_or_equal_list("patch_size", 14)
    frames = settings.integer_or_equal_list("temporal_patch_size", 2)
    merge = settings.integer("merge_size", 2)
    token = frames * (patch * merge) ** 2
    if not max(least, token) <= most:
        raise CheckpointError(
            f"{name} allows {least} to {most} pixels an image, must be a range that holds one token ({token} "
            "pixels)"
        )
    return ImageSpec(
        patch_size=patch,
        temporal_patch_size=frames,
        merge_size=merge,
        min_pixels=least,
        max_pixels=most,
        mean=_channels(settings, "image_mean", CLIP_MEAN) if normalize else (0.0, 0.0, 0.0),
        std=std,
        rescale_factor=settings.number("rescale_factor", 1 / 255) if rescale else 1.0,
        resample=resample,
    )


def _channels(
    settings: Settings, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = settings.find(key, list(default))
    items = value if isinstance(value, list) else [value] * 3
    if len(items) != 3 or any(
        isinstance(item, bool) or not isinstance(item, int | float) or not abs(item) <= MAX_NUMBER
        for item in items
    ):
        raise CheckpointError(f"{settings.where} gives {key} {value!r}, must be a number per RGB channel")
    return float(items[0]), float(items[1]), float(items[2])


def with_pixel_budget(content: bytes, image: ImageSpec) -> bytes:
    """preprocessor_config.json with the upper limit of `image`, wherever the checkpoint's release keeps it.

    Raises:
        CheckpointError: no JSON object.
    """
    document = json_object(content, PREPROCESSOR_NAME)
    size = document.get("size")
    if isinstance(size, dict):
        size["longest_edge"] = image.max_pixels
    if "max_pixels" in document:
        document["max_pixels"] = image.max_pixels
    if not isinstance(size, dict) and "max_pixels" not in document:
        document["size"] = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
