"""Reuse leaves answers as they are: thousands of random interleavings against runs that reuse nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reuse_fixtures as fakes

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.answer import Clock
from autoglm_edge.runtime.generation import Drafter, Generation
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.prompt.image import PatchedImage
from autoglm_edge.runtime.reuse.features import FeatureCache
from autoglm_edge.runtime.reuse.options import Lookup
from autoglm_edge.runtime.reuse.pace import BLOCK_COSTS, Pace
from autoglm_edge.runtime.reuse.prefix import PrefixStore
from autoglm_edge.runtime.reuse.prefix_folder import BlockFolder
from autoglm_edge.runtime.reuse.sequence import stable_length
from autoglm_edge.runtime.runner import Runner
from autoglm_edge.runtime.sampling import Sampler, SamplingParams

CONTEXT = 400


@pytest.fixture(autouse=True)
def _prefill_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_FROM_TOKENS", fakes.LEAST)


def make_runner(
    model: fakes.FakeModel,
    *,
    memory_tokens: int = 10**6,
    disk: Path | None = None,
    disk_bytes: int = 10**9,
    image_bytes: int = 10**6,
    bundle: str = "b",
) -> Runner:
    def store(sequence: Any) -> PrefixStore:
        folder = None
        if disk is not None:
            cache = sequence.cache
            folder = BlockFolder(
                disk, disk_bytes, bundle=bundle, dtype=cache.dtype, row_shape=cache.row_shape
            )
        return PrefixStore(bundle.encode(), 16, 16 * memory_tokens, folder)

    features = FeatureCache(image_bytes)
    return Runner(model, CONTEXT, fakes.TOKENS, store=store, features=features)  # type: ignore[arg-type]


def answer(
    runner: Runner,
    prompt: Prompt,
    budget: int,
    *,
    pace: Pace | None = None,
    lookup: Lookup = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[list[int], Clock]:
    clock = Clock()
    rows = list(runner.run(prompt, len(prompt.ids) - 1, cancelled=cancelled, clock=clock))
    if not rows:
        return [], clock
    drafter = Drafter(prompt.ids, pace or Pace(BLOCK_COSTS), lookup, never=(fakes.TOKENS.image,))
    generation = Generation(
        runner.sequence,
        rows[-1][-1],
        prompt.next_position,
        sampler=Sampler(SamplingParams(), vocab=fakes.VOCAB),
        drafter=drafter,
        budget=budget,
        clock=clock,
    )
    ids: list[int] = []
    while not generation.done and not cancelled():
        ids.append(generation.sample())
        if not generation.ready and not generation.done:
            run = generation.next_run()
            generation.ran(runner.feed(runner.sequence, run, generation.position), 1.0)
    return ids, clock


class Sessions:
    """Random conversations as a phone agent holds them: the last turn alone has a picture."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.talks: list[list[list[Any]]] = []

    def words(self, low: int, high: int) -> list[int]:
        return [self.rng.randrange(5, 12) for _ in range(self.rng.randint(low, high))]

    def prompt(self) -> Prompt:
        """The next request of one of the conversations, or of a new one."""
        rng = self.rng
        if not self.talks or rng.random() < 0.2:
            # Few system prompts, some of which begin alike.
            system = [20, *[rng.choice((6, 7))] * 40, *[8] * rng.randrange(3)]
            self.talks = [*self.talks[-3:], [system]]
        talk = rng.choice(self.talks)
        if len(talk) > 5 or rng.random() < 0.1:
            del talk[rng.randint(1, len(talk)) :]
        if rng.random() < 0.8:
            talk.append(
                [1, *self.words(2, 20), 13, *self.words(1, 30)]
            )  # an earlier turn, without its picture
        parts = [part for turn in talk for part in turn] + [1]
        pictures = [
            fakes.picture(rng.randrange(3), rng.randint(1, 4), rng.randint(1, 4))
            for _ in range(rng.choice((0, 1, 1, 1, 2)))
        ]
        return fakes.make_prompt([*parts, *pictures, *self.words(0, 9), 13])


@pytest.mark.parametrize("integer", [False, True])
def test_thousands_of_interleavings_leave_cache_and_answers_as_in_a_cold_run(
    integer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions by turns, errors, cancelling, restarts, damage, little memory and disk: 2 x 1200 answers."""
    monkeypatch.setattr("autoglm_edge.runtime.reading.PREFILL_CHUNK", 32)
    rng = random.Random(integer)
    sessions = Sessions(rng)
    pace = Pace(BLOCK_COSTS)
    model = fakes.FakeModel(integer)
    runner = make_runner(model, disk=tmp_path, disk_bytes=30_000)
    reused = accepted = asked = 0
    for _ in range(1200):
        if rng.random() < 0.05:
            memory = rng.choice((0, 50, 150, 10**6))
            disk = tmp_path if rng.random() < 0.5 else None
            model = fakes.FakeModel(integer)
            runner = make_runner(
                model, memory_tokens=memory, disk=disk, disk_bytes=rng.choice((8_000, 30_000))
            )
        if rng.random() < 0.1:
            damage(rng, tmp_path)
        prompt, budget = sessions.prompt(), rng.randint(1, 30)
        expected = fakes.cold(prompt, budget, integer=integer)
        cache = model.caches[-1]
        luck = rng.random()
        if luck < 0.1:
            model.fail_after = rng.randrange(12)
            try:
                answer(runner, prompt, budget, pace=pace)
            except KeyboardInterrupt:
                continue
            finally:
                model.fail_after = -1
        elif luck < 0.2:
            checks = iter(range(rng.randrange(20)))
            answer(runner, prompt, budget, pace=pace, cancelled=lambda left=checks: next(left, None) is None)
            continue
        elif luck < 0.25:
            start = rng.randrange(len(prompt.ids))
            list(runner.run(prompt, start, cancelled=lambda: False, clock=Clock(), reuse=False))
            continue
        else:
            ids, clock = answer(runner, prompt, budget, pace=pace, lookup=rng.choice((True, "auto", False)))
            assert ids == expected.ids
            assert clock.reused_tokens < len(prompt.ids)
            reused += clock.reused_tokens
            accepted += clock.accepted_tokens
            asked += len(prompt.ids)
        assert cache.states == expected.states
        if rng.random() < 0.2:
            runner.slots.persist(runner.sequence)

    assert reused > 0.25 * asked
    assert accepted > 1000


def damage(rng: random.Random, folder: Path) -> None:
    """Cut, flip, replace or delete one of the files."""
    files = sorted(folder.glob("*.kv"))
    if not files:
        return
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 2:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(rng.choice(files).read_bytes())


def agent_prompt(steps: int, *, shown: int, more: int = 0) -> Prompt:
    """The request of a step: system prompt, earlier turns without pictures, the screen of this one."""
    turns = [part for step in range(steps) for part in (1, 5 + step, 6, 7, 13, 8, 9, 5 + step)]
    return fakes.make_prompt(
        [*range(5, 20), *[10, 11] * 40, *turns, 1, fakes.picture(shown, 4, 5), 6, 7, *[9] * more, 13]
    )


def test_the_next_step_of_an_agent_computes_only_what_stands_after_the_last_screens_place() -> None:
    model = fakes.FakeModel()
    runner = make_runner(model)
    first, second = agent_prompt(0, shown=1), agent_prompt(1, shown=2)
    answer(runner, first, 5)
    before = int(np.flatnonzero(first.ids == fakes.TOKENS.image_start)[0])

    clock = answer(runner, second, 5)[1]

    assert before - 16 < clock.reused_tokens <= before
    assert model.encoded == [1, 2]


def test_the_same_prompt_again_runs_its_last_block_and_no_vision() -> None:
    model = fakes.FakeModel()
    runner = make_runner(model, image_bytes=0)
    prompt = agent_prompt(2, shown=1, more=20)
    answer(runner, prompt, 1)
    computed = model.computed

    ids, clock = answer(runner, prompt, 1)

    assert 0 < model.computed - computed <= 16
    assert clock.reused_tokens == len(prompt.ids) - (model.computed - computed)
    assert model.encoded == [1]
    assert clock.timings(len(prompt.ids), 1).cached_images == 1
    assert ids == fakes.cold(prompt, 1, integer=False).ids


def test_an_encoded_picture_is_kept_where_its_tokens_are_not() -> None:
    model = fakes.FakeModel()
    runner = make_runner(model)
    answer(runner, fakes.make_prompt([5, fakes.picture(1), 6]), 1)
    prompt = fakes.make_prompt([6, fakes.picture(1), 6])

    ids, clock = answer(runner, prompt, 1)

    assert model.encoded == [1]
    assert clock.reused_tokens == 0
    assert clock.timings(len(prompt.ids), 1).cached_images == 1
    assert ids == fakes.cold(prompt, 1, integer=False).ids


@pytest.mark.parametrize("other", [fakes.picture(2, 2, 3), fakes.picture(1, 3, 2), fakes.picture(1, 2, 4)])
def test_a_picture_of_other_content_or_grid_is_another_picture(other: PatchedImage) -> None:
    model = fakes.FakeModel()
    runner = make_runner(model)
    begin = [5] * 20
    answer(runner, fakes.make_prompt([*begin, fakes.picture(1, 2, 3), *begin]), 1)

    clock = answer(runner, fakes.make_prompt([*begin, other, *begin]), 1)[1]

    assert clock.reused_tokens == 16
    assert len(model.encoded) == 2


def test_tokens_of_an_answer_are_reused_unless_prompts_have_a_graph_of_their_own() -> None:
    for integer, extra in ((False, 16), (True, 0)):
        runner = make_runner(fakes.FakeModel(integer))
        prompt = fakes.make_prompt([*[5, 6, 7] * 7, 13])
        ids, _ = answer(runner, prompt, 12)

        clock = answer(runner, fakes.make_prompt([*prompt.ids, *ids, 1, *[5] * 20, 13]), 1)[1]

        assert clock.reused_tokens == 16 + extra


def test_what_another_conversation_displaced_comes_back_from_memory() -> None:
    runner = make_runner(fakes.FakeModel())
    first, other = agent_prompt(1, shown=1), fakes.make_prompt([19, *[6] * 50, 13])
    answer(runner, first, 3)
    answer(runner, other, 3)

    clock = answer(runner, agent_prompt(2, shown=2), 3)[1]

    assert clock.reused_tokens == stable_length(first.ids, fakes.TOKENS) // 16 * 16


def test_a_restart_finds_the_prefix_on_disk(tmp_path: Path) -> None:
    first = make_runner(fakes.FakeModel(), disk=tmp_path)
    answer(first, agent_prompt(1, shown=1), 3)
    first.slots.persist(first.sequence)
    model = fakes.FakeModel()

    ids, clock = answer(make_runner(model, disk=tmp_path), agent_prompt(2, shown=2), 3)

    assert clock.reused_tokens == stable_length(agent_prompt(1, shown=1).ids, fakes.TOKENS) // 16 * 16
    assert ids == fakes.cold(agent_prompt(2, shown=2), 3, integer=False).ids


def test_a_bundle_never_sees_the_files_of_another(tmp_path: Path) -> None:
    first = make_runner(fakes.FakeModel(), disk=tmp_path, bundle="one")
    answer(first, agent_prompt(1, shown=1), 3)
    first.slots.persist(first.sequence)

    clock = answer(make_runner(fakes.FakeModel(), disk=tmp_path, bundle="two"), agent_prompt(1, shown=1), 3)[
        1
    ]

    assert clock.reused_tokens == 0
    assert list(tmp_path.glob("*.kv"))


def test_a_closed_runner_says_so() -> None:
    runner = make_runner(fakes.FakeModel())
    runner.close()

    for use in (
        lambda: runner.model,
        lambda: runner.sequence,
        lambda: answer(runner, agent_prompt(0, shown=1), 1),
    ):
        with pytest.raises(RequestError, match="this engine is closed"):
            use()


@pytest.mark.parametrize(
    ("parts", "length"),
    [
        ([5, 6, 7], 3),
        ([5, fakes.picture(1), 6], 1),
        ([5, 1, 6, fakes.picture(1), 7, fakes.picture(2), 8, 13], 3),
        ([1, fakes.picture(1), 6, 13, 8, 1, 9, 13], 11),
        ([1, fakes.picture(1), 6, 13, 8, 1, fakes.picture(1), 9, 13], 9),
    ],
)
def test_all_before_the_pictures_of_the_last_turn_stays(parts: list[Any], length: int) -> None:
    assert stable_length(fakes.make_prompt(parts).ids, fakes.TOKENS) == length
