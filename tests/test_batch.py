"""Several answers at once are what each of them is alone, whatever comes between.

The fake model of reuse_fixtures computes rows that tell how they came about, so a row that landed in another
answer's slot, or was taken over wrongly, shows. Real graphs follow, on the embedded model.
    python -m pytest tests/test_batch.py
"""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reuse_fixtures as fakes
from test_reuse import CONTEXT, Sessions, agent_prompt

from autoglm_edge.embedded import pocket_path, sample_screenshot
from autoglm_edge.errors import BundleError, RequestError
from autoglm_edge.runtime.answer import Delta
from autoglm_edge.runtime.batch.batch import Batch
from autoglm_edge.runtime.batch.job import Job
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
from autoglm_edge.runtime.session import Prefill, SessionOptions
from autoglm_edge.runtime.stops import StopText


@pytest.fixture(autouse=True)
def _least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_FROM_TOKENS", fakes.LEAST)


@pytest.fixture(scope="module")
def pocket_int4(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), "int4")


@pytest.fixture(scope="module", params=["int4", "int8"])
def pocket(request: pytest.FixtureRequest, bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(pocket_path(), request.param)


@pytest.fixture(scope="module")
def letters(pocket_int4: Path) -> Tokenizer:
    return Tokenizer.from_folder(pocket_int4)


class Later:
    """The pool of the pictures, whose one thread works when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: work(*arguments)))
        return future

    def run_one(self) -> None:
        while self.waiting:
            future, work = self.waiting.pop(0)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
                return


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    pool = Later()
    monkeypatch.setattr("autoglm_edge.runtime.pictures.ThreadPoolExecutor", lambda *_: pool)
    monkeypatch.setattr("autoglm_edge.runtime.batch.batch.PATIENCE", 0.0)
    return pool


def make_batch(
    model: fakes.FakeModel,
    letters: Tokenizer,
    count: int,
    *,
    memory: int = 10**6,
    images: int = 10**6,
    now: Callable[[], float] = time.perf_counter,
) -> Batch:
    def store(sequence: Any) -> PrefixStore:
        return PrefixStore(b"b", 16, 16 * memory, None)

    runner = Runner(
        model,  # type: ignore[arg-type]
        CONTEXT,
        fakes.TOKENS,
        count=count,
        store=store,
        features=FeatureCache(images),
    )
    tokens = fakes.TOKENS
    return Batch(runner, letters, tokens, pace=Pace(BLOCK_COSTS), lookup="auto", now=now)


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


@pytest.mark.parametrize("kind", ["decoder", "integer", "layers"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_thousands_of_answers_together_are_those_of_cold_runs(
    letters: Tokenizer, monkeypatch: pytest.MonkeyPatch, later: Later, kind: str, count: int
) -> None:
    """Sessions by turns, errors, cancels and drops at any moment: 12 x 400 answers.

    Several prompts are on their way at a time, pictures are done whenever it happens, and a piece of work
    takes as long as it likes, so turns go to whomever.
    """
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 32)
    monkeypatch.setattr("autoglm_edge.runtime.reading.SHARED_CHUNK", 32)
    rng = random.Random(f"{kind} {count}")
    sessions = Sessions(rng)
    how = {kind: True} if kind != "decoder" else {}
    model = fakes.FakeModel(**how)
    clock = iter(lambda: rng.random(), None)
    batch = make_batch(
        model,
        letters,
        count,
        memory=rng.choice((0, 100, 10**6)),
        images=rng.choice((0, 100, 10**6)),
        now=lambda: next(clock),
    )
    wanted: dict[int, tuple[Prompt, int]] = {}
    cancels: dict[int, threading.Event] = {}
    given: dict[int, list[int]] = {}
    ended = reused = most = 0
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
                later.run_one()
                batch.step()
            except KeyboardInterrupt:
                batch.clear()
                wanted.clear()
            model.fail_after = -1
            # What came of a step that did not fail is lost here, so these answers are not checked.
            wanted.clear()
            batch.clear()
            assert batch.room == count
            assert not model.expanded
            continue
        if rng.random() < 0.5:
            later.run_one()
        events = batch.step()
        most = max(most, len(batch._reading))
        for number, event in events:
            assert isinstance(event, Delta), event
            given[number] += event.token_ids
            if event.finish_reason is None:
                continue
            prompt, budget = wanted.pop(number)
            expected = fakes.cold(prompt, budget, **how)
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
    assert not model.expanded
    assert ended > 200
    assert reused > 1000
    assert not model.together or max(model.together) <= count
    if count > 2:
        assert max(model.together) == count
        assert most == count


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

    # 300 tokens in pieces of 64 are 5 runs, with a break after each of them.
    assert len(before_second) >= 5
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


LONG = [*range(5, 20), *[8, 9] * 180, 13]
SHORT = [20, *[6] * 9, 13]


def first_tokens(batch: Batch) -> list[int]:
    """Which answer began when, until all have ended."""
    order: list[int] = []
    while batch.active:
        for number, event in batch.step():
            assert isinstance(event, Delta), event
            if number not in order:
                order.append(number)
    return order


@pytest.mark.parametrize("kind", ["decoder", "integer", "layers"])
def test_a_short_prompt_is_read_between_the_pieces_of_a_long_one(
    letters: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 64)
    model = fakes.FakeModel(**({kind: True} if kind != "decoder" else {}))
    batch = make_batch(model, letters, 3)
    long = batch.add(make_job(fakes.make_prompt(LONG), 3))
    batch.step()
    batch.step()
    before = model.pieces
    short = batch.add(make_job(fakes.make_prompt(SHORT), 3))

    events = batch.step()

    assert events[0][0] == short
    assert model.pieces - before == 1  # its own
    assert first_tokens(batch) == [short, long]


def test_the_shortest_of_several_prompts_begins_first(letters: Tokenizer) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 4, now=lambda: float(model.computed))
    lengths = [300, 200, 40, 100]
    for length in lengths:
        batch.add(make_job(fakes.make_prompt([*[5 + length // 40] * length, 13]), 3))

    assert first_tokens(batch)[:2] == [2, 3]


@pytest.mark.parametrize("kind", ["decoder", "integer", "layers"])
def test_short_prompts_without_end_hold_a_long_one_up_by_as_much_as_it_takes_itself(
    letters: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.SHARED_CHUNK", 32)
    model = fakes.FakeModel(**({kind: True} if kind != "decoder" else {}))
    batch = make_batch(model, letters, 3, memory=0, now=lambda: float(model.pieces))
    prompt = fakes.make_prompt(LONG)
    long = batch.add(make_job(prompt, 1))
    steps, began = 0, False
    while not began:
        steps += 1
        if batch.room:
            batch.add(make_job(fakes.make_prompt([steps % 14 + 5, *[6, 7] * 20, 13]), 1))
        began = any(number == long for number, _ in batch.step())
        assert steps < 1000

    alone = fakes.FakeModel(**({kind: True} if kind != "decoder" else {}))
    alone_batch = make_batch(alone, letters, 3, memory=0)
    alone_batch.add(make_job(prompt, 1))
    run_all(alone_batch)
    # Alone its pieces are longer, but for a layer; and a piece of another one may come at each end.
    pieces = alone.pieces if kind == "layers" else -(-len(prompt.ids) // 32)
    assert pieces < model.pieces <= 2 * pieces + 3


def test_one_prompt_at_a_time_is_read_layer_by_layer(letters: Tokenizer) -> None:
    """The model says so if there are two; short prompts pass all the same."""
    model = fakes.FakeModel(layers=True)
    batch = make_batch(model, letters, 4)
    prompts = [
        fakes.make_prompt([5 + seed, *LONG[:length], 13]) for seed, length in enumerate((300, 200, 250))
    ]
    numbers = [batch.add(make_job(prompt, 4)) for prompt in prompts]
    batch.step()
    short = batch.add(make_job(fakes.make_prompt(SHORT), 4))

    ids: dict[int, list[int]] = {}
    while batch.active:
        for number, event in batch.step():
            assert isinstance(event, Delta)
            if not ids:
                assert number == short
            ids.setdefault(number, []).extend(event.token_ids)

    for number, prompt in zip(numbers, prompts, strict=True):
        assert ids[number] == fakes.cold(prompt, 4, layers=True).ids


def test_a_prompt_takes_over_what_another_one_reads_at_the_same_time(
    letters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 64)
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 2)
    first = batch.add(make_job(fakes.make_prompt([*LONG[:-1], 7, 13]), 3))
    batch.step()
    second = batch.add(make_job(fakes.make_prompt([*LONG[:-1], 9, 9, 13]), 3))

    ids = run_all(batch)

    assert model.computed < len(LONG) + 2 * (16 + 5)
    assert ids[first] == fakes.cold(fakes.make_prompt([*LONG[:-1], 7, 13]), 3).ids
    assert ids[second] == fakes.cold(fakes.make_prompt([*LONG[:-1], 9, 9, 13]), 3).ids


def test_a_picture_holds_up_nobody_who_comes_later(letters: Tokenizer, later: Later) -> None:
    """Also where it was all there was to do, and also the same picture of somebody else."""
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 3)
    pictured = fakes.make_prompt([6, fakes.picture(1), 7])
    numbers = [batch.add(make_job(pictured, 3)) for _ in range(2)]
    for _ in range(3):
        assert batch.step() == []
    plain = batch.add(make_job(fakes.make_prompt(SHORT), 3))

    ids: dict[int, list[int]] = {}
    while plain not in ids or len(ids[plain]) < 3:
        for number, event in batch.step():
            assert isinstance(event, Delta)
            ids.setdefault(number, []).extend(event.token_ids)
    assert [*ids] == [plain]
    assert model.encoded == []
    later.run_one()
    ids |= run_all(batch)

    assert model.encoded == [1]
    assert [ids[number] for number in numbers] == [fakes.cold(pictured, 3).ids] * 2


def test_a_picture_is_asked_for_while_another_prompt_has_all_turns(
    letters: Tokenizer, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 32)
    batch = make_batch(fakes.FakeModel(), letters, 2)
    batch.add(make_job(fakes.make_prompt(LONG[:100]), 3))
    batch.step()
    batch.add(make_job(fakes.make_prompt([*[7] * 250, fakes.picture(1), *[6] * 50]), 3))

    batch.step()

    assert len(later.waiting) == 1
    later.run_one()
    run_all(batch)


def test_a_cancelled_answer_does_not_wait_for_its_picture(letters: Tokenizer, later: Later) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 2)
    cancel = threading.Event()
    number = batch.add(make_job(fakes.make_prompt([6, fakes.picture(1), 7]), 3, cancel))
    batch.step()
    cancel.set()

    ((ended, event),) = batch.step()

    assert ended == number
    assert isinstance(event, Delta) and event.finish_reason == "cancelled"
    assert batch.room == 2
    later.run_one()
    assert model.encoded == []


def test_a_picture_that_cannot_be_encoded_is_the_matter_of_its_prompt(
    letters: Tokenizer, later: Later
) -> None:
    model = fakes.FakeModel()
    batch = make_batch(model, letters, 2)
    encode = model.encode_image

    def broken(image: Any) -> np.ndarray:
        if image.patches[0, 0, 0, 0] == 1:
            raise BundleError("the vision tower fails")
        return encode(image)

    model.encode_image = broken  # type: ignore[method-assign]
    bad = batch.add(make_job(fakes.make_prompt([6, fakes.picture(1), 7]), 3))
    good = batch.add(make_job(fakes.make_prompt([6, fakes.picture(2), 7]), 3))

    events = []
    while batch.active:
        later.run_one()
        events += batch.step()

    assert [number for number, event in events if isinstance(event, Exception)] == [bad]
    assert sum(len(event.token_ids) for number, event in events if isinstance(event, Delta)) == 3
    assert {number for number, _ in events} == {bad, good}


def test_a_prompt_that_took_turns_says_what_it_waited(letters: Tokenizer) -> None:
    """The times of a prompt add up to what its first token took; pieces of others are in none but one."""
    model = fakes.FakeModel()
    prefill = model.prefill_pieces

    def slow(*arguments: Any, **options: Any) -> Any:
        for _ in prefill(*arguments, **options):
            time.sleep(0.005)
            yield

    model.prefill_pieces = slow  # type: ignore[method-assign]
    batch = make_batch(model, letters, 2)
    numbers = [batch.add(make_job(fakes.make_prompt([*[part] * 300, 13]), 1)) for part in (5, 6)]
    found = {}
    while batch.active:
        for number, event in batch.step():
            assert isinstance(event, Delta)
            found[number] = event.timings

    last = found[numbers[1]]
    assert last is not None
    assert last.waiting_ms > 10
    parts = last.waiting_ms + last.prefill_ms + last.image_ms + last.reuse_ms
    assert parts <= last.ttft_ms <= parts + 1000


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


@pytest.mark.parametrize(
    ("precision", "prefill"),
    [("int4", "auto"), ("int4", "layers"), ("int4", "decoder"), ("int8", "auto")],
)
def test_the_embedded_model_reads_short_prompts_first_and_answers_as_ever(
    bundle_of: Callable[..., Path], precision: str, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two long prompts are under way when two short ones come.

    With 8 bits one of them has a picture, which is done when it is done. With 4 bits it could matter in the
    last place of a score who is decoded with whom, so there all goes by a clock that counts turns.
    """
    bundle = bundle_of(pocket_path(), precision)
    picture = {"type": "image", "image": str(sample_screenshot())}
    contents: list[Any] = [
        "Scroll far down, please. " * 60,
        [*([picture] if precision == "int8" else ()), {"type": "text", "text": "Go back, and again. " * 70}],
        "Yes",
        "点击登录",
    ]
    questions = [[{"role": "user", "content": content}] for content in contents]
    with Engine.load(bundle, threads=1, prefill=prefill) as engine:
        alone = [
            [token for delta in engine.chat(ask, max_tokens=12) for token in delta.token_ids]
            for ask in questions
        ]

    order: list[int] = []
    ids: dict[int, list[int]] = {}
    with Engine.load(bundle, threads=1, concurrency=4, prefill=prefill) as engine, engine.batch() as batch:
        monkeypatch.setattr(batch, "_now", itertools.count().__next__)
        jobs = [engine.job(engine.prompt(ask), SamplingParams(), max_tokens=12) for ask in questions]
        lengths = [len(job.prompt.ids) for job in jobs]
        numbers = [batch.add(job) for job in jobs[:2]]
        batch.step()
        numbers += [batch.add(job) for job in jobs[2:]]
        while batch.active:
            for number, event in batch.step():
                assert isinstance(event, Delta), event
                order += [number] if number not in ids else []
                ids.setdefault(number, []).extend(event.token_ids)

    assert min(lengths[:2]) > 500 > 100 > max(lengths[2:])
    assert {*order[:2]} == {*numbers[2:]}
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
