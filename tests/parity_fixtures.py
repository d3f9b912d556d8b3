"""What the parity tests share: short prompts, recorded answers of a tiny model, and edits of bundle files."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from autoglm_edge.parity.screens import draw_list, draw_shapes


def data_uri(image: Image.Image) -> str:
    """An image as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def prompt_file(folder: Path) -> Path:
    """Four short prompts: text, a portrait picture, two pictures, a screen to tap."""
    rng = random.Random(3)
    portrait, landscape = draw_shapes(rng, (120, 230)), draw_shapes(rng, (210, 90))
    screen = draw_list(rng, (150, 330))

    def user(text: str, *images: Image.Image) -> list[dict[str, Any]]:
        parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    label, box = next(iter(screen.boxes.items()))
    prompts: list[dict[str, Any]] = [
        {"name": "text-zh-0", "messages": [{"role": "user", "content": "打开设置"}]},
        {"name": "image-en-0", "messages": user("What is it?", portrait)},
        {"name": "images-en-0", "messages": user("Which differs?", landscape, portrait)},
        {
            "name": "tap-en-0",
            "messages": [
                {"role": "system", "content": "You are a phone agent.\n"},
                *user(f"Tap {label}", screen.image),
            ],
            "box": list(box),
        },
    ]
    path = folder / "prompts.jsonl"
    lines = [json.dumps({**prompt, "max_tokens": 8}, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def edit_weights(
    bundle: Path,
    target: Path,
    part: str,
    matches: Callable[[str], bool],
    change: Callable[[np.ndarray], np.ndarray],
) -> Path:
    """A copy of a bundle in which some initializers of one graph are changed in place, in the data file.

    Args:
        bundle: to copy.
        target: new folder.
        part: "decoder", "embedding" or "vision".
        matches: which initializers, by name.
        change: from the old values to the new ones, of the same shape.
    """
    shutil.copytree(bundle, target)
    model = onnx.load(target / f"{part}.onnx", load_external_data=False)
    changed = 0
    for tensor in model.graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if not matches(tensor.name) or "location" not in place:
            continue
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset = target / place["location"], int(place["offset"])
        old = np.fromfile(path, kind, int(np.prod(tensor.dims)), offset=offset).reshape(tensor.dims)
        new = np.ascontiguousarray(change(old), kind)
        assert new.shape == old.shape
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(new.tobytes())
        changed += 1
    assert changed, f"no initializer of {part} matches"
    return target
