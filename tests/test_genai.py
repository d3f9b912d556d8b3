"""onnxruntime-genai loads a bundle as it is and gives our tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm_edge.runtime.engine import Engine

genai = pytest.importorskip("onnxruntime_genai", reason="needs the package onnxruntime-genai")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("images", [0, 1])
def test_onnxruntime_genai_gives_the_same_greedy_tokens(
    precision: str,
    images: int,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    pictures: list[Image.Image],
) -> None:
    engine = engine_of(checkpoint_of("odd-head48"), precision)
    parts = [{"type": "image", "image": picture} for picture in pictures[:images]]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "打开设置 open settings"}]}]
    prompt = engine.prompt(messages)
    with Engine.load(engine.bundle.path, threads=2, prefill="decoder") as same_graphs:
        ours = [token for delta in same_graphs.chat(messages, max_tokens=16) for token in delta.token_ids]

    theirs = generate(engine.bundle.path, prompt, 16)

    assert theirs[: len(ours)] == ours


def generate(bundle: Path, prompt: Any, tokens: int) -> list[int]:
    """Greedy ids by onnxruntime-genai."""
    model = genai.Model(str(bundle))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt.ids) + tokens, do_sample=False)
    generator = genai.Generator(model, params)
    inputs = genai.NamedTensors()
    inputs["input_ids"] = prompt.ids[None].astype(np.int32)
    for image in prompt.images:
        inputs["pixel_values"] = image.pixel_values
        inputs["image_grid_thw"] = np.array([image.grid], np.int64)
        inputs["num_image_tokens"] = np.array([image.tokens], np.int64)
    generator.set_inputs(inputs)
    ids = []
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return ids
