"""Answers and scores of real graphs after reuse and with drafts, against engines that reuse nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.answer import Clock
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.machine.integers import integers
from autoglm_edge.runtime.native.unit import Unit, best_unit
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions

needs_matrices = pytest.mark.skipif(best_unit() < Unit.MATRICES, reason="no AMX here")


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny"), "fp32")


@pytest.fixture
def warm(bundle: Path, tmp_path: Path) -> Iterator[Engine]:
    options = ReuseOptions(prefix_cache_bytes=300_000, prefix_cache_dir=tmp_path / "kv", lookup=True)
    with Engine.load(bundle, threads=1, reuse=options) as engine:
        yield engine


@pytest.fixture(scope="module")
def fresh(bundle: Path) -> Iterator[Engine]:
    with Engine.load(bundle, threads=1, reuse=ReuseOptions.off()) as engine:
        yield engine


def screen(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (112, 84, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def agent_messages(rng: random.Random) -> list[dict[str, Any]]:
    """System prompt, earlier turns without pictures, a turn with one."""
    talk = rng.randrange(3)
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"operate phone {talk} " * 8}]
    for step in range(rng.randrange(4)):
        messages.append({"role": "user", "content": f"** Screen Info ** app {talk} {step}"})
        messages.append({"role": "assistant", "content": f'<think>open</think><answer>do("{step}")</answer>'})
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"go on {rng.randrange(3)}"}]
    if rng.random() < 0.8:
        parts.insert(0, {"type": "image", "image": screen(rng.randrange(3))})
    messages.append({"role": "user", "content": parts})
    return messages


def greedy(engine: Engine, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], str, Any]:
    deltas = list(engine.chat(messages, **options))
    ids = [token for delta in deltas for token in delta.token_ids]
    return ids, "".join(delta.text for delta in deltas), deltas[-1]


def test_a_hundred_answers_of_a_real_graph_are_those_of_cold_runs(warm: Engine, fresh: Engine) -> None:
    rng = random.Random(5)
    reused = accepted = 0
    for _ in range(100):
        messages = agent_messages(rng)
        options: dict[str, Any] = {
            "max_tokens": rng.randint(1, 24),
            # The tiny model would pick placeholders of pictures, which nothing answers.
            "logit_bias": {fresh.bundle.manifest.tokens.image: -100},
        }
        if rng.random() < 0.3:
            options |= {"temperature": 0.7, "seed": rng.randrange(100), "top_p": 0.9}
        if rng.random() < 0.3:
            options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.2}
        if rng.random() < 0.3:
            options |= {"stop": ["e", "ab"]}
        if rng.random() < 0.1:
            next(warm.chat(messages, **options))  # abandoned after a token

        ids, text, last = greedy(warm, messages, **options)

        assert (ids, text) == greedy(fresh, messages, **options)[:2]
        assert last.usage.cached_tokens == last.timings.reused_tokens < last.usage.prompt_tokens
        reused += last.usage.cached_tokens
        accepted += last.timings.accepted_tokens

    assert reused > 3000
    assert accepted > 30


def scores_of(engine: Engine, messages: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    """Logits (V,) after a prompt, and how many of its tokens were reused."""
    prompt, clock = engine.prompt(messages), Clock()
    (rows,) = engine._runner.run(prompt, len(prompt.ids) - 1, cancelled=lambda: False, clock=clock)
    return rows[-1], clock.reused_tokens


def test_scores_after_reuse_are_those_of_a_cold_run(warm: Engine, fresh: Engine) -> None:
    """Equal bit by bit where this was written (onnxruntime 1.31, Zen 4); kernels elsewhere may have tiles of
    more rows than a block."""
    rng = random.Random(9)
    worst, reused = 0.0, 0
    for _ in range(40):
        messages = agent_messages(rng)
        ours, count = scores_of(warm, messages)
        worst = max(worst, float(np.abs(ours - scores_of(fresh, messages)[0]).max()))
        reused += count

    assert reused > 1000
    assert worst < 1e-5


@pytest.mark.parametrize(
    ("precision", "parts", "prefill"),
    [
        ("int4", {}, "decoder"),
        ("int4", {}, "layers"),
        pytest.param("int4", {}, "native", marks=needs_matrices),
        ("int4", {"prefill": "int8"}, "integer"),
        ("int8", {}, "decoder"),
        ("int8-blocks", {}, "decoder"),
    ],
)
def test_rounded_activations_leave_scores_as_in_a_cold_run_too(
    checkpoint_of: Callable[..., Path],
    bundle_of: Callable[..., Path],
    precision: str,
    parts: dict[str, Any],
    prefill: Any,
) -> None:
    """A difference of 1e-7 can move an activation to the next of 255 steps, and scores by 0.1."""
    bundle = Bundle.open(bundle_of(checkpoint_of("tiny"), precision, **parts))
    options = SessionOptions(threads=1, prefill=prefill)
    if not integers().exact and (prefill != "decoder" or precision == "int8"):
        pytest.skip("this processor computes sums of bytes wrongly")
    rng = random.Random(3)
    with (
        Engine(bundle, options=options, context=1000) as warm,
        Engine(bundle, options=options, context=1000, reuse=ReuseOptions.off()) as fresh,
    ):
        assert warm.plan.prefill == prefill
        for _ in range(30):
            messages = agent_messages(rng)
            ours, _ = scores_of(warm, messages)
            assert np.abs(ours - scores_of(fresh, messages)[0]).max() < 1e-5


def test_drafted_and_accepted_tokens_are_counted(warm: Engine) -> None:
    ask = [{"role": "user", "content": "a"}]
    (loop,) = warm.tokenizer.encode("a")

    last = greedy(warm, ask, max_tokens=30, logit_bias={loop: 100})[2]

    timings = last.timings
    assert timings.drafted_tokens >= timings.accepted_tokens > 20
    assert timings.decoder_runs + timings.accepted_tokens == last.usage.completion_tokens - 1


def test_scoring_from_a_position_gives_the_rows_from_there(warm: Engine) -> None:
    ids = warm.tokenize([{"role": "user", "content": "what is on the screen, and what comes next?"}])
    whole = warm.score(ids)

    rows = np.concatenate(list(warm.score_chunks(ids, start=len(ids) - 5)))

    np.testing.assert_allclose(rows, whole[-5:], atol=1e-5)


@pytest.mark.parametrize("start", [-1, 7, 1.5, "1", True])
def test_scoring_starts_at_a_token_of_the_sequence(warm: Engine, start: Any) -> None:
    with pytest.raises(RequestError, match="start is"):
        warm.score_chunks([5, 6, 7], start=start)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix": 1}, "prefix is 1"),
        ({"prefix_cache_bytes": -1}, "prefix_cache_bytes is -1"),
        ({"prefix_cache_bytes": True}, "prefix_cache_bytes is True"),
        ({"prefix_disk_bytes": 1.5}, "prefix_disk_bytes is 1.5"),
        ({"image_cache_bytes": "1"}, "image_cache_bytes is '1'"),
        ({"lookup": "always"}, "lookup is 'always'"),
        ({"lookup": 1}, "lookup is 1|prefix"),
        ({"prefix_cache_dir": ""}, "prefix_cache_dir is ''"),
        ({"prefix_cache_dir": 5}, "prefix_cache_dir is 5"),
        ({"prefix_cache_dir": __file__}, "which is a file"),
        ({"prefix_cache_dir": "kv", "prefix": False}, "leave one of them out"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ReuseOptions(**options)
