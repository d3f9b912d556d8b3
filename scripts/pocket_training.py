"""The two training stages of the pocket model.

In: a drawn `Pool`, a tokenizer and a `Recipe`. Out: weights in a work folder. Stage one teaches the vision
tower alone to name and place what it sees; stage two trains everything on packed questions. Work is shared
by processes of one thread each that average gradients, which on a busy machine is much faster than threads
that wait for each other at every operator. This module knows nothing of scoring with `generate`, nor of the
final folder.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from pocket_model import PocketForward, make_model, make_optimizers, pointing_loss, rate_factor, reading_loss
from pocket_pool import BACKGROUND, Pool, open_pool
from pocket_questions import inside, tapped_point
from pocket_rows import RowDataset, RowMaker, shuffled
from pocket_tokenizer import VOCABULARY_SIZE
from pocket_vocabulary import BUTTONS, LABELS
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class JointCycle:
    """One cycle of stage two: how long, and which lessons.

    The learning rate is planned for `planned` steps, of which `steps` are taken. `pointing` is the weight of
    looking from a label to where it is shown, `placing` that of carrying its place on to the digits;
    `with_absent` adds things that are not shown and the states of switches. `button_share` of the screens are
    drawn among those with buttons. `vision_rate` is the peak rate of the vision matrices, `rate` a factor on
    all rates.
    """

    steps: int
    planned: int
    pointing: float = 0.0
    placing: float = 0.0
    with_absent: bool = False
    button_share: float = 0.0
    vision_rate: float = 0.01
    rate: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the code: steps, seeds and rates.

    One step takes `batch` screens over all workers. Stage one has cycles, each with its number of steps, a
    learning rate from peak to nearly nothing, the weight of naming what is seen, and whether to name it in
    cells that show none of its text. Stage two has `JointCycle`s.
    """

    seed: int = 1
    screens: int = 32000
    workers: int = 2
    batch: int = 16
    vision_cycles: tuple[tuple[int, float, bool], ...] = (
        (1400, 0.0, True),
        (900, 2.0, True),
        (500, 2.0, False),
    )
    joint_cycles: tuple[JointCycle, ...] = (
        JointCycle(800, 1100),
        JointCycle(300, 600, pointing=0.5),
        JointCycle(600, 600, pointing=0.5, placing=0.3),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True, button_share=0.6, vision_rate=0.02),
        JointCycle(500, 500, pointing=0.5, placing=0.3, with_absent=True, button_share=0.4, rate=0.5),
    )
    checkpoint_every: int = 200
    report_every: int = 20
    compiled: bool = True


def train(recipe: Recipe, tokenizer_folder: Path, work: Path) -> Path:
    """Run both stages; returns the file with the weights.

    A finished cycle of stage one in the work folder (`vision-0.pt`, ...) is used again.
    """
    pool_folder = work / "pool"
    open_pool(pool_folder, f"train-{recipe.seed}", recipe.screens, recipe.workers)
    open_pool(pool_folder, f"valid-{recipe.seed}", 256, recipe.workers)
    torch.multiprocessing.spawn(_worker, (recipe, tokenizer_folder, work), recipe.workers)
    return work / f"joint-{len(recipe.joint_cycles) - 1}.pt"


def _worker(rank: int, recipe: Recipe, tokenizer_folder: Path, work: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29541")
    dist.init_process_group("gloo", rank=rank, world_size=recipe.workers, timeout=timedelta(hours=1))
    pool = open_pool(work / "pool", f"train-{recipe.seed}", recipe.screens)
    valid = open_pool(work / "pool", f"valid-{recipe.seed}", 256)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    trained = PocketForward(make_model(recipe.seed), len(LABELS) + 1)
    stage = Stage(rank, recipe, trained, tokenizer, pool, valid)
    for cycle in range(len(recipe.vision_cycles)):
        vision_file = work / f"vision-{cycle}.pt"
        if not vision_file.exists():
            stage.run_vision(cycle)
            dist.barrier()
            if rank == 0:
                torch.save(trained.state_dict(), vision_file)
            dist.barrier()
        trained.load_state_dict(torch.load(vision_file))
    for cycle in range(len(recipe.joint_cycles)):
        joint_file = work / f"joint-{cycle}.pt"
        if not joint_file.exists():
            stage.run_joint(cycle, work)
            dist.barrier()
            if rank == 0:
                torch.save(trained.state_dict(), joint_file)
            dist.barrier()
        trained.load_state_dict(torch.load(joint_file))
    dist.destroy_process_group()


class Stage:
    """One worker's view of the training: its share of each batch and the shared step."""

    def __init__(
        self,
        rank: int,
        recipe: Recipe,
        trained: PocketForward,
        tokenizer: PreTrainedTokenizerFast,
        pool: Pool,
        valid: Pool,
    ) -> None:
        self._rank, self._recipe, self._trained = rank, recipe, trained
        self._tokenizer, self._pool, self._valid = tokenizer, pool, valid
        self._share = recipe.batch // recipe.workers
        self._label_tokens = label_tokens(tokenizer)
        self._compile: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = (
            (lambda function: torch.compile(function, dynamic=False))
            if recipe.compiled
            else (lambda function: function)
        )

    def run_vision(self, cycle: int) -> None:
        """One cycle of stage one: the vision tower and the thrown-away head, on screens without questions."""
        trained, recipe = self._trained, self._recipe
        trained.model.model.language_model.requires_grad_(False)
        trained.model.lm_head.requires_grad_(False)
        steps, class_weight, everywhere = recipe.vision_cycles[cycle]
        order = shuffled(len(self._pool.pixels), steps * recipe.batch, recipe.seed + 100 * cycle)

        def loss(pixels: Tensor, cells: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return trained.cell_loss(trained.see(pixels), cells, class_weight, everywhere)

        compiled = self._compile(loss)

        def step(number: int) -> dict[str, Tensor]:
            start = number * recipe.batch + self._rank * self._share
            indices = order[start : start + self._share]
            pixels = torch.from_numpy(self._pool.pixels[indices])
            return {"cells": compiled(pixels, torch.from_numpy(self._pool.cells[indices]).long())}

        optimizers = make_optimizers(trained, 0.02, 0.02, 2e-3)
        self._loop(f"vision {cycle}", step, steps, optimizers, lambda _: None)
        self._report_cells()

    def run_joint(self, cycle: int, work: Path) -> None:
        """One cycle of stage two: all weights, on packed questions; writes checkpoints into `work`."""
        trained, recipe = self._trained, self._recipe
        trained.requires_grad_(True)
        plan = recipe.joint_cycles[cycle]
        order = shuffled(len(self._pool.pixels), plan.planned * recipe.batch, recipe.seed + 1 + 100 * cycle)
        order = self._favour_buttons(order, plan.button_share, recipe.seed + 100 * cycle)
        rows = RowDataset(self._pool, RowMaker(self._tokenizer), recipe.seed + 100 * cycle, order)

        see = self._compile(trained.see)  # the decoder gains nothing: masked attention takes most of its time

        def step(number: int) -> dict[str, Tensor]:
            start = number * recipe.batch + self._rank * self._share
            batch = torch.utils.data.default_collate(
                [rows[item] for item in range(start, start + self._share)]
            )
            with torch.autocast("cpu", torch.bfloat16):
                image = see(batch["pixels"])
                hidden, watched = trained.read(*trained.decoder_inputs(batch, image), watch=True)
                assert watched is not None
                answers = batch["labels"] >= 0
                logits = trained.model.lm_head(hidden[answers])
                return {
                    "points": plan.pointing * pointing_loss(watched, batch, plan.with_absent),
                    "places": plan.placing * trained.place_loss(watched, batch, plan.with_absent),
                    "reads": plan.placing * reading_loss(watched, batch),
                    "answer": F.cross_entropy(logits.float(), batch["labels"][answers]),
                    "cells": 0.5 * trained.cell_loss(image, batch["cells"]),
                    "names": 0.5 * trained.alignment_loss(image, batch["cells"], self._label_tokens),
                }

        def after(number: int) -> None:
            if number % recipe.checkpoint_every == 0:
                self._report_answers()
                if self._rank == 0:
                    torch.save(trained.state_dict(), work / f"joint-{cycle}-{number}.pt")

        optimizers = make_optimizers(
            trained, plan.rate * plan.vision_rate, plan.rate * 0.02, plan.rate * 3e-3
        )
        self._loop(f"joint {cycle}", step, plan.steps, optimizers, after, plan.planned)

    def _favour_buttons(self, order: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.int64]:
        """Replace a share of the scheduled screens by screens with buttons."""
        if not share:
            return order
        classes = [LABELS.index(label) for label in BUTTONS]
        candidates = np.flatnonzero(np.isin(self._pool.cells[..., 0], classes).any(1))
        rng = np.random.default_rng(seed)
        return np.where(rng.random(len(order)) < share, rng.choice(candidates, len(order)), order)

    def _loop(
        self,
        name: str,
        step: Callable[[int], dict[str, Tensor]],
        steps: int,
        optimizers: list[torch.optim.Optimizer],
        after: Callable[[int], None],
        planned: int | None = None,
    ) -> None:
        parameters = [parameter for parameter in self._trained.parameters() if parameter.requires_grad]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        peaks = [group["lr"] for group in groups]
        started = time.time()
        for number in range(steps):
            losses = step(number)
            torch.stack(list(losses.values())).sum().backward()
            _average_gradients(parameters, self._recipe.workers)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            factor = rate_factor(number, planned or steps, warm_up=80)
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * factor
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if self._rank == 0 and (number + 1) % self._recipe.report_every == 0:
                shown = " ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
                speed = (number + 1) * self._recipe.batch / (time.time() - started)
                print(f"{name} {number + 1}/{steps} {shown} {speed:.1f} screens/s", flush=True)
            after(number + 1)

    @torch.no_grad()
    def _report_cells(self) -> None:
        if self._rank:
            return
        cells = torch.from_numpy(self._valid.cells[:128]).long()
        out = self._trained.cell_head(self._trained.see(torch.from_numpy(self._valid.pixels[:128])))
        classes, digits, states = out.split((BACKGROUND + 1, 40, 3), -1)
        shown = cells[..., 0] != BACKGROUND
        right = [(classes.argmax(-1) == cells[..., 0])[shown & (cells[..., 6] > 0)]]
        right += [
            (part.argmax(-1) == cells[..., i + 1])[shown] for i, part in enumerate(digits.split(10, -1))
        ]
        right += [(states.argmax(-1) == cells[..., 5])[shown]]
        print(
            "valid cells: class, digits, state",
            [round(100 * r.float().mean().item(), 1) for r in right],
            flush=True,
        )

    @torch.no_grad()
    def _report_answers(self, count: int = 64) -> None:
        """Print teacher-forced scores on validation screens."""
        if self._rank:
            return
        maker = RowMaker(self._tokenizer)
        exact: dict[str, list[bool]] = {}
        hits: list[bool] = []
        for index in range(count):
            screen = self._valid.screen(index)
            row = maker.make(screen, random.Random(f"valid:{index}"))
            batch = {
                name: torch.from_numpy(getattr(row, name))[None]
                for name in ("ids", "segments", "positions", "labels")
            }
            batch["pixels"] = torch.from_numpy(self._valid.pixels[index])[None]
            batch["image_start"] = torch.tensor([row.image_start])
            with torch.autocast("cpu", torch.bfloat16):
                best = self._trained.logits(batch)[0].argmax(-1)
            segment = batch["segments"][batch["labels"] >= 0]
            target = batch["labels"][batch["labels"] >= 0]
            for number, question in enumerate(row.questions):
                mine = segment == number + 1
                exact.setdefault(question.kind, []).append(bool((best[mine] == target[mine]).all()))
                if question.box:
                    hits.append(inside(tapped_point(self._tokenizer.decode(best[mine])), question.box))
        shown = {kind: f"{100 * sum(values) / len(values):.1f}" for kind, values in exact.items()}
        print(
            f"valid answers: hit {100 * sum(hits) / len(hits):.1f} of {len(hits)}, exact {shown}", flush=True
        )


def label_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Averaging matrix from the vocabulary to labels, (labels, V)."""
    matrix = torch.zeros(len(LABELS), VOCABULARY_SIZE)
    for index, label in enumerate(LABELS):
        ids = tokenizer(label, add_special_tokens=False).input_ids
        for token in ids:
            matrix[index, token] += 1 / len(ids)
    return matrix


def _average_gradients(parameters: list[torch.nn.Parameter], workers: int) -> None:
    """Replace gradients by their mean over all workers."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))
