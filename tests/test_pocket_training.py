"""The training of the pocket model: who takes which screens, what the lessons ask, how rates go."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import pocket_lessons as lessons  # noqa: E402
import pocket_qat  # noqa: E402
import train_pocket  # noqa: E402
from pocket_batches import Batch, Schedule, answered, collate, make_rows  # noqa: E402
from pocket_canvas import render  # noqa: E402
from pocket_model import PocketForward, make_model  # noqa: E402
from pocket_optimizers import make_optimizers, rate_factor  # noqa: E402
from pocket_pool import GRIDS, Grid, Pool, cell_labels, shrink  # noqa: E402
from pocket_recipe import ALL, JointCycle, Recipe, VisionCycle  # noqa: E402
from pocket_rows import RowMaker  # noqa: E402
from pocket_screens import make_screen  # noqa: E402
from pocket_training import label_tokens  # noqa: E402
from pocket_vocabulary import BUTTONS, LABELS  # noqa: E402

BUTTON = LABELS.index(next(iter(BUTTONS)))
SEED = "train-unit"


def blank_pool(grid: Grid, count: int) -> Pool:
    """Screens that show nothing, every third of them a button."""
    cells = np.full((count, grid.cells, 7), len(LABELS), np.int16)
    cells[::3, 0, 0] = BUTTON
    return Pool(SEED, grid, np.zeros((count, 1, 1, 3), np.uint8), cells)


def drawn_pool(grid: Grid, count: int) -> Pool:
    screens = [make_screen(f"{SEED}:{index}") for index in range(count)]
    pixels = np.stack([shrink(render(screen, 1), grid) for screen in screens])
    return Pool(SEED, grid, pixels, np.stack([cell_labels(screen, grid) for screen in screens]))


def test_workers_share_a_step_and_all_see_the_same_schedule() -> None:
    pools = [blank_pool(grid, 12) for grid in GRIDS]
    whole, again = (Schedule(pools, ALL, 20, 4, 7, 0.0) for _ in range(2))

    for step in range(20):
        shares = [whole.indices(step, rank, 2) for rank in range(2)]
        assert whole.pool(step) is again.pool(step)
        assert np.concatenate(shares).tolist() == again.indices(step, 0, 4).tolist()
        assert len(set(np.concatenate(shares).tolist())) == 4


def test_a_schedule_that_favours_buttons_takes_only_screens_with_some() -> None:
    pools = [blank_pool(grid, 12) for grid in GRIDS]

    schedule = Schedule(pools, ALL, 10, 4, 7, 1.0)

    assert all(index % 3 == 0 for step in range(10) for index in schedule.indices(step, 0, 4))


@pytest.fixture(scope="module")
def step() -> tuple[PocketForward, Batch, RowMaker]:
    """Fresh weights, and one step of two screens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")
    maker, pool = RowMaker(tokenizer), drawn_pool(GRIDS[-1], 2)
    lesson = maker.lesson(pool.grid, random.Random(1), 0.0, 100)
    indices = np.arange(2)
    batch = collate(make_rows(maker, pool, indices, lesson, ["a", "b"]), lesson, pool.pixels)
    batch["cells"] = torch.from_numpy(pool.cells).long()
    return PocketForward(make_model(1), len(LABELS) + 1), batch, maker


def test_every_lesson_is_a_number_that_teaches_something(step: tuple[PocketForward, Batch, RowMaker]) -> None:
    trained, batch, _ = step
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")
    image = trained.see(batch["pixels"])
    _, watched = trained.read(batch, image, watch=True)
    assert watched is not None
    losses = {
        "cells": lessons.cell_loss(trained, image, batch["cells"]),
        "names": lessons.alignment_loss(trained, image, batch["cells"], label_tokens(tokenizer)),
        "places": lessons.place_loss(trained, watched, batch, with_state=True),
        "points": lessons.pointing_loss(watched, batch, with_absent=True),
        "reads": lessons.reading_loss(watched, batch),
    }

    for name, loss in losses.items():
        found = torch.autograd.grad(loss, list(trained.parameters()), retain_graph=True, allow_unused=True)
        assert loss.shape == () and torch.isfinite(loss), name
        assert sum(float(part.abs().sum()) for part in found if part is not None) > 0, name


def test_the_right_tokens_answer_every_question_of_a_row() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "autoglm_edge" / "pocket")
    maker = RowMaker(tokenizer)
    row = maker.make(
        make_screen("answers"), random.Random(2), maker.lesson(GRIDS[0], random.Random(1), 0.0, 40)
    )
    best = torch.from_numpy(row.labels[row.labels >= 0])

    found = list(answered(row, best))

    assert [question for question, _, _ in found] == list(row.questions)
    assert all((given == wanted).all() for _, given, wanted in found)
    assert sum(len(given) for _, given, _ in found) == len(best)


def test_every_weight_has_one_optimizer_and_frozen_ones_have_none() -> None:
    trained = PocketForward(make_model(1), 3)
    trained.model.lm_head.requires_grad_(False)

    optimizers = make_optimizers(trained, 0.1, 0.2, 0.3)

    held = [id(one) for item in optimizers for group in item.param_groups for one in group["params"]]
    assert sorted(held) == sorted(id(one) for one in trained.parameters() if one.requires_grad)
    assert {group["lr"] for item in optimizers for group in item.param_groups} == {0.1, 0.2, 0.3}


def test_rates_rise_to_their_peak_and_fall_to_a_fiftieth() -> None:
    factors = [rate_factor(step, 100, warm_up=10) for step in range(101)]

    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.02)


def test_the_recipe_begins_its_second_training_with_the_vision_tower() -> None:
    cycles = Recipe().cycles

    assert isinstance(cycles[Recipe.second], VisionCycle) and isinstance(cycles[-1], JointCycle)
    assert {len(cycle.grids) for cycle in cycles} == {len(GRIDS)}
    assert [sum(cycle.grids) for cycle in cycles] == pytest.approx([1.0] * len(cycles))


def test_the_commands_have_their_options() -> None:
    assert {option.name for option in train_pocket.main.params} >= {"out", "work", "seed", "workers"}
    assert {option.name for option in pocket_qat.main.params} >= {"model", "recipe", "steps", "rate"}
