"""Our graphs and engine against transformers, in fp32, on random checkpoints of several geometries.

Tolerance: both sides compute in fp32 in another order of summation. Logits here reach about 5; differences
stay below 1e-5, the limit of 2e-4 leaves room for other CPUs' kernels and is still a hundredth of what bf16
rounding does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import SHAPES
from PIL import Image
from reference import reference_greedy, reference_logits

TOLERANCE = 2e-4
GEOMETRIES = sorted(name for name in SHAPES if not name.startswith("autoglm"))


def conversation(pictures: list[Image.Image], images: int) -> list[dict[str, Any]]:
    """System prompt, a question with the first pictures, an answer, a last question with the last picture."""
    parts = [{"type": "image", "image": picture} for picture in pictures[: max(0, images - 1)]]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are a phone agent. 你是手机助手。\n"},
        {"role": "user", "content": [*parts, {"type": "text", "text": "打开设置 open settings"}]},
        {"role": "assistant", "content": '<think>settings</think><answer>do(action="Back")'},
    ]
    last = [{"type": "image", "image": pictures[images - 1]}] if images else []
    return [
        *messages,
        {"role": "user", "content": [*last, {"type": "text", "text": "next step, please 下一步"}]},
    ]


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_logits_equal_transformers_at_every_position(
    geometry: str,
    images: int,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    reference_of: Callable[[Path], Any],
    pictures: list[Image.Image],
) -> None:
    checkpoint = checkpoint_of(geometry, dtype="float32")
    engine, reference = engine_of(checkpoint), reference_of(checkpoint)
    prompt = engine.prompt(conversation(pictures, images))

    ours = engine.score(prompt.ids, pictures[:images])

    expected = reference_logits(reference, prompt)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < TOLERANCE


@pytest.mark.parametrize("form", ["4x", "5x", "mirrored"])
def test_both_config_forms_give_the_same_model(
    form: str,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    reference_of: Callable[[Path], Any],
    pictures: list[Image.Image],
) -> None:
    checkpoint = checkpoint_of("odd-axes", dtype="float32", config_form=form)
    engine = engine_of(checkpoint)
    prompt = engine.prompt(conversation(pictures, 1))

    ours = engine.score(prompt.ids, pictures[:1])

    assert np.abs(ours - reference_logits(reference_of(checkpoint), prompt)).max() < TOLERANCE


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_greedy_answers_equal_generate(
    geometry: str,
    images: int,
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    reference_of: Callable[[Path], Any],
    pictures: list[Image.Image],
) -> None:
    checkpoint = checkpoint_of(geometry, dtype="float32")
    engine = engine_of(checkpoint)
    messages = conversation(pictures, images)

    deltas = list(engine.chat(messages, max_tokens=24))

    expected = reference_greedy(
        reference_of(checkpoint), engine.prompt(messages), 24, engine.tokenizer.vocab_size
    )
    ours = [token for delta in deltas for token in delta.token_ids]
    ended = expected[-1] in engine.bundle.manifest.tokens.eos
    assert ours == (expected[:-1] if ended else expected)
    assert deltas[-1].finish_reason == ("stop" if ended else "length")


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_prompt_in_pieces_gives_the_same_logits_as_in_one(
    chunk: int, checkpoint_of: Callable[..., Path], engine_of: Callable[..., Any], pictures: list[Image.Image]
) -> None:
    engine = engine_of(checkpoint_of("tiny", dtype="float32"))
    prompt = engine.prompt(conversation(pictures, 2))

    whole = prefill(engine, prompt, len(prompt.ids))
    pieces = prefill(engine, prompt, chunk)

    # Same kernels over the same numbers; only the order of partial sums in attention differs.
    assert np.abs(whole - pieces).max() < 2e-5


def prefill(engine: Any, prompt: Any, chunk: int) -> np.ndarray:
    """Logits (T, V) when the prompt is run `chunk` tokens at a time."""
    from autoglm_edge.runtime import reading as module
    from autoglm_edge.runtime.answer import Clock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORE_CHUNK", chunk)
        run = engine._runner.run(prompt, 0, cancelled=lambda: False, clock=Clock(), reuse=False)
        return np.concatenate(list(run))


def test_bf16_and_fp16_checkpoints_are_read_exactly(
    checkpoint_of: Callable[..., Path],
    engine_of: Callable[..., Any],
    reference_of: Callable[[Path], Any],
    pictures: list[Image.Image],
) -> None:
    for dtype in ("bfloat16", "float16"):
        checkpoint = checkpoint_of("tiny", dtype=dtype)
        engine = engine_of(checkpoint)
        prompt = engine.prompt(conversation(pictures, 1))

        ours = engine.score(prompt.ids, pictures[:1])

        assert np.abs(ours - reference_logits(reference_of(checkpoint), prompt)).max() < TOLERANCE


def test_the_fp16_graphs_follow_fp32_within_half_precision(
    checkpoint_of: Callable[..., Path], engine_of: Callable[..., Any], pictures: list[Image.Image]
) -> None:
    checkpoint = checkpoint_of("tiny", dtype="float32")
    exact, half = engine_of(checkpoint), engine_of(checkpoint, "fp16")
    prompt = exact.prompt(conversation(pictures, 2))

    difference = exact.score(prompt.ids, pictures[:2]) - half.score(prompt.ids, pictures[:2])

    # fp16 keeps 11 bits: 5e-4 of values near 1, summed over a few dozen roundings.
    assert 0 < np.abs(difference).max() < 0.05
