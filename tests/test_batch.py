"""Several answers at once are what each of them is alone, whatever comes between.

The fake model of reuse_fixtures computes rows that tell how they came about, so a row that landed in another
answer's slot, or was taken over wrongly, shows. Real graphs follow, on the embedded model.
    python -m pytest tests/test_batch.py
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reuse_fixtures as fakes
from test_reuse import CONTEXT, Sessions, agent_prompt

from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.errors import BundleError, RequestError
from autoglm_edge.runtime.answer import Delta
from autoglm_edge.runtime.batch.batch import Batch, Job
from autoglm_edge.runtime.batch.slots import Slots
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.generation import Cancel
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.prompt.tokenizer import Tokenizer
from autoglm_edge.runtime.reuse.features import FeatureCache
from autoglm_edge.runtime.reuse.pace import BLOCK_COSTS, Pace
from autoglm_edge.runtime.reuse.prefix import PrefixStore
from autoglm_edge.runtime.reuse.sequence import text_keys
from autoglm_edge.runtime.runner import Runner
from autoglm_edge.runtime.sampling import Sampler, SamplingParams
from autoglm_edge.runtime.session import SessionOptions
from autoglm_edge.runtime.stops import StopText


@pytest.fixture(autouse=True)
def _least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.runner.PREFILL_FROM_TOKENS", fakes.LEAST)


@pytest.fixture(scope="module")
def pocket_int4(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int4")


@pytest.fixture(scope="module", params=["int4", "int8"])
def pocket(request: pytest.FixtureRequest, bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), request.param)


@pytest.fixture(scope="module")
def letters(pocket_int4: Path) -> Tokenizer:
    return Tokenizer.from_folder(pocket_int4)


def make_batch(model: fakes.FakeModel, letters: Tokenizer, count: int, *, memory: int = 10**6) -> Batch:
    def store(sequence: Any) -> PrefixStore:
        return PrefixStore(b"b", 16, 16 * memory, None)

    runner = Runner(
        model,  # type: ignore[arg-type]
        CONTEXT,
        fakes.TOKENS,
        count=count,
        store=store,
        features=FeatureCache(10**6),
    )
    tokens = fakes.TOKENS
    return Batch(runner, letters, tokens, pace=Pace(BLOCK_COSTS), lookup="auto")


def make_job(prompt: Prompt, budget: int, cancel: threading.Event | None = None) -> Job:
    sampler = Sampler(SamplingParams(), vocab=fakes.VOCAB)
    return Job(prompt, sampler, StopText(()), budget, Cancel(cancel))


def run_all(batch: Batch) -> dict[int, list[int]]:
    """Ids of all answers that are under way."""
    ids: dict[int, list[int]] = {}
    while batch.active:
        for number, event in batch.step():
            assert isinstance(event, Delta), event
            ids.setdefault(number, []).extend(event.token_ids)
    return ids


# --- the fake model


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_thousands_of_answers_together_are_those_of_cold_runs(
    letters: Tokenizer, monkeypatch: pytest.MonkeyPatch, integer: bool, count: int
) -> None:
    """Sessions by turns, errors, cancels and drops at any moment: 8 x 400 answers."""
    monkeypatch.setattr("autoglm_edge.runtime.runner.PREFILL_CHUNK", 32)
    monkeypatch.setattr("autoglm_edge.runtime.runner.SHARED_CHUNK", 32)
    rng = random.Random(10 * count + integer)
    sessions = Sessions(rng)
    model = fakes.FakeModel(integer)
    batch = make_batch(model, letters, count, memory=rng.choice((0, 100, 10**6)))
    wanted: dict[int, tuple[Prompt, int]] = {}
    cancels: dict[int, threading.Event] = {}
    given: dict[int, list[int]] = {}
    ended = reused = 0
    added = 0
    while added < 400 or batch.active:
        while added < 400 and batch.room and rng.random() < 0.7:
            prompt, budget = sessions.prompt(), rng.randint(1, 30)
            cancel = threading.Event()
            number = batch.add(make_job(prompt, budget, cancel))
            wanted[number], cancels[number], given[number] = (prompt, budget), cancel, []
            added += 1
        luck = rng.random()
        open_ones = [*wanted]
        if open_ones and luck < 0.01:
            cancels[rng.choice(open_ones)].set()
        elif open_ones and luck < 0.02:
            number = rng.choice(open_ones)
            batch.drop(number)
            del wanted[number]
        elif luck < 0.03:
            model.fail_after = rng.randrange(4)
            try:
                batch.step()
            except KeyboardInterrupt:
                batch.clear()
                wanted.clear()
            model.fail_after = -1
            # What came of a step that did not fail is lost here, so these answers are not checked.
            wanted.clear()
            batch.clear()
            continue
        for number, event in batch.step():
            assert isinstance(event, Delta), event
            given[number] += event.token_ids
            if event.finish_reason is None:
                continue
            prompt, budget = wanted.pop(number)
            expected = fakes.cold(prompt, budget, integer=integer)
            if event.finish_reason == "cancelled":
                assert cancels[number].is_set()
                assert given[number] == expected.ids[: len(given[number])]
                continue
            assert event.finish_reason == "length"
            assert given[number] == expected.ids
            assert event.usage is not None
            assert event.usage.prompt_tokens == len(prompt.ids)
            reused += event.usage.cached_tokens
            ended += 1
            states = [cache.states for cache in model.caches]
            assert any(rows[: len(expected.states)] == expected.states for rows in states)
    assert batch.room == count
    assert ended > 200
    assert reused > 1000
    assert not model.together or max(model.together) <= count
    if count > 2:
        assert max(model.together) == count


def test_while_a_prompt_is_read_the_others_go_on(letters: Tokenizer) -> None:
    model = fakes.FakeModel(integer=True)
    batch = make_batch(model, letters, 2)
    first = batch.add(make_job(fakes.make_prompt([5, 6, 7]), 40))
    batch.step()
    second = batch.add(make_job(fakes.make_prompt([*[8, 9] * 150, 13]), 3))

    before_second: list[int] = []
    began = False
    while not began:
        for number, event in batch.step():
            assert isinstance(event, Delta)
            began = began or number == second
            if number == first and not began:
                before_second += event.token_ids

    # 300 tokens in pieces of 64 are 5 runs, with a break in each of them and after it.
    assert len(before_second) >= 10
    run_all(batch)


def test_a_picture_is_encoded_beside_the_others(letters: Tokenizer) -> None:
    model = fakes.FakeModel()
    encode, go = model.encode_image, threading.Event()

    def slow(image: Any) -> np.ndarray:
        assert go.wait(10)
        return encode(image)

    model.encode_image = slow  # type: ignore[method-assign]
    batch = make_batch(model, letters, 2)
    first = batch.add(make_job(fakes.make_prompt([5, 6, 7]), 50))
    batch.step()
    second = batch.add(make_job(fakes.make_prompt([6, fakes.picture(1), 7]), 3))

    meanwhile = [number for _ in range(20) for number, _ in batch.step()]
    go.set()
    ids = run_all(batch)

    assert set(meanwhile) == {first}
    assert len(meanwhile) >= 20
    assert ids[second] == fakes.cold(fakes.make_prompt([6, fakes.picture(1), 7]), 3, integer=False).ids


def test_answers_to_one_prompt_read_it_once(letters: Tokenizer) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 3)
    prompt = agent_prompt(2, shown=1, more=20)
    for _ in range(3):
        batch.add(make_job(prompt, 4))

    ids = run_all(batch)

    assert model.encoded == [1]
    assert model.computed < len(prompt.ids) + 3 * (16 + 4)
    assert [*ids.values()] == [fakes.cold(prompt, 4, integer=False).ids] * 3


def test_a_conversation_goes_on_in_its_slot_and_a_new_one_takes_an_empty_one(letters: Tokenizer) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 3, memory=0)
    for shown in (1, 2):
        batch.add(make_job(agent_prompt(shown, shown=shown), 3))
        run_all(batch)
        batch.add(make_job(fakes.make_prompt([*[14 + shown] * 60, 13]), 3))
        run_all(batch)

    computed = model.computed
    batch.add(make_job(agent_prompt(3, shown=3), 3))
    run_all(batch)

    assert model.computed - computed < 60  # the new turn and its screen


def test_one_answers_failure_is_not_the_others(letters: Tokenizer) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 2)
    good = batch.add(make_job(fakes.make_prompt([5, 6, 7]), 20))
    broken = make_job(fakes.make_prompt([6, 7, 8]), 20)
    calls = iter(range(5))

    def sample(logits: Any) -> int:
        if next(calls, None) is None:
            raise BundleError("the decoder gave NaN")
        return 5

    broken.sampler.sample = sample  # type: ignore[method-assign]
    bad = batch.add(broken)

    ids, errors = [], []
    while batch.active:
        for number, event in batch.step():
            if isinstance(event, Exception):
                errors.append((number, event))
            elif number == good:
                ids += event.token_ids

    assert [number for number, _ in errors] == [bad]
    assert ids == fakes.cold(fakes.make_prompt([5, 6, 7]), 20, integer=False).ids
    assert batch.room == 2


# --- real graphs


QUESTIONS = (
    "Open the settings",
    "点击登录",
    "Scroll down, please",
    "What is on the screen?",
    "Go back",
    "Wait",
)


def test_answers_of_the_embedded_model_together_are_those_it_gives_alone(pocket: Path) -> None:
    def messages(text: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if len(text) % 2:
            parts.insert(0, {"type": "image", "image": str(sample_screenshot())})
        return [{"role": "user", "content": parts}]

    with Engine.load(pocket, threads=1) as engine:
        alone = []
        for text in QUESTIONS:
            deltas = [*engine.chat(messages(text), max_tokens=24)]
            alone.append([token for delta in deltas for token in delta.token_ids])
    with Engine.load(pocket, threads=1, concurrency=4) as engine, engine.batch() as batch:
        numbers = [
            batch.add(engine.job(engine.prompt(messages(text)), SamplingParams(), max_tokens=24))
            for text in QUESTIONS
        ]
        ids = run_all(batch)

    assert [ids[number] for number in numbers] == alone


@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_logits_of_ragged_rows_are_those_of_lone_ones(bundle_of: Callable[..., Path], precision: str) -> None:
    """Within 2e-4: the same kernels, but products of several rows and of one sum in another order.

    4-bit weights with float activations here: rounded to bytes, a number between two of them may go either
    way for a difference in the last bit.
    """
    exact = {"accuracy_level": 0} if precision == "int4" else {}
    model = Model(Bundle.open(bundle_of(pocket_path(), precision, **exact)), SessionOptions("cpu", 1))
    slots = Slots(model.new_slots(96, 4))
    rng = np.random.default_rng(0)
    lone = []
    for length in (3, 40, 17, 64):
        ids = rng.integers(10, 900, length + 2)
        cache = model.new_cache(96)
        keys = text_keys(ids.tolist(), 0)
        sequence = slots.take(keys)
        for target in (cache, sequence.cache):
            model.prefill(model.embed(ids[:length]), np.tile(np.arange(length), (3, 1)), target)
        slots.activate(sequence)
        steps = [
            model.forward(model.embed(ids[at : at + 1]), np.full((3, 1), at), cache)[0]
            for at in (length, length + 1)
        ]
        lone.append((ids, length, np.array(steps)))

    together = []
    for step in range(2):
        embeds = np.concatenate([model.embed(ids[at + step : at + step + 1]) for ids, at, _ in lone])
        places = np.tile([at + step for _, at, _ in lone], (3, 1))
        together.append(model.forward_each(embeds, places, slots.buffers))

    for row, (_, _, steps) in enumerate(lone):
        assert np.abs(np.array(together)[:, row] - steps).max() < 2e-4


def test_slots_that_change_places_keep_their_rows(pocket_int4: Path) -> None:
    model = Model(Bundle.open(pocket_int4), SessionOptions("cpu", 1))
    buffers = model.new_slots(20, 3)
    rng = np.random.default_rng(0)
    rows = []
    for cache, length in zip(buffers.caches, (7, 0, 20), strict=True):
        shape = (*cache.row_shape[:3], length, cache.row_shape[4])
        rows.append(rng.standard_normal(shape).astype(cache.dtype))
        cache.write(0, rows[-1])

    for first, second in ((0, 2), (1, 2), (0, 1), (2, 0)):
        buffers.swap(first, second)
        rows[first], rows[second] = rows[second], rows[first]
        for cache, expected in zip(buffers.caches, rows, strict=True):
            assert cache.length == expected.shape[3]
            assert (cache.read(0, cache.length) == expected).all()


def test_caches_are_freed_when_nobody_needs_them(pocket_int4: Path) -> None:
    """At once, not when the collector of cycles comes by: they are gigabytes."""
    model = Model(Bundle.open(pocket_int4), SessionOptions("cpu", 1))
    gc.collect()
    gc.disable()
    try:
        slots = model.new_slots(8, 2)
        embeds = model.embed(np.array([10, 11])).swapaxes(0, 1)
        model.forward_each(embeds, np.zeros((3, 2), np.int64), slots)
        model.forward(embeds[:1], np.ones((3, 1), np.int64), slots.caches[0])
        there = weakref.ref(slots)
        del slots
        assert there() is None

        engine = Engine.load(pocket_int4, threads=1, concurrency=2)
        assert [*engine.chat([{"role": "user", "content": "Hi"}], max_tokens=3)]
        there = weakref.ref(engine._runner.slots.buffers)
        engine.close()
        assert there() is None
    finally:
        gc.enable()


def test_an_engine_in_a_batch_is_taken(pocket_int4: Path) -> None:
    with Engine.load(pocket_int4, threads=1, concurrency=2) as engine:
        with engine.batch() as batch:
            batch.add(engine.job(engine.prompt([{"role": "user", "content": "Hi"}]), SamplingParams()))
            batch.step()
            with pytest.raises(RequestError, match="giving another answer"):
                next(iter(engine.chat([{"role": "user", "content": "Hi"}])))
        assert batch.active == 0
        deltas = [*engine.chat([{"role": "user", "content": "Hi"}], max_tokens=2)]
        assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("concurrency", [0, -1, 65, 1.5, True])
def test_a_concurrency_that_makes_no_sense_is_refused(pocket_int4: Path, concurrency: Any) -> None:
    with pytest.raises(RequestError, match=r"concurrency is .*, must be an integer from 1 to 64"):
        Engine.load(pocket_int4, concurrency=concurrency)
