"""The training of the pocket model: the cycles of a recipe, each with its lessons.

In: a tokenizer, a `Recipe`, and perhaps weights to begin with. Out: weights in a work folder. Vision cycles
teach the vision tower alone to name and place what it sees; joint cycles train everything on packed
questions. Work is shared by processes of one thread each that average gradients, which on a busy machine is
much faster than threads that wait for each other at every operator. This module knows nothing of scoring
with `generate`, nor of the final folder.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from pocket_batches import Schedule, answered, collate, make_rows
from pocket_lessons import alignment_loss, cell_loss, place_loss, pointing_loss, reading_loss
from pocket_model import PocketForward, make_model
from pocket_optimizers import make_optimizers, rate_factor
from pocket_pool import BACKGROUND, GRIDS, Pool, open_pool
from pocket_questions import inside, tapped_point
from pocket_recipe import JointCycle, Recipe, VisionCycle
from pocket_rows import RowMaker
from pocket_tokenizer import VOCABULARY_SIZE
from pocket_vocabulary import LABELS
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

VALID_SCREENS = 192


def train(recipe: Recipe, tokenizer_folder: Path, work: Path, start: Path | None = None) -> Path:
    """Run the cycles; returns the file with the weights.

    A finished cycle in the work folder (`cycle-0.pt`, ...) is used again.

    Args:
        recipe: what to do.
        tokenizer_folder: of the tokenizer.
        work: folder of screens and weights.
        start: file with weights to begin the second training with; the first one is left out then.
    """
    for grid, size in zip(GRIDS, recipe.screens, strict=True):
        open_pool(work / "pool", f"train-{recipe.seed}", size, grid, recipe.workers)
        open_pool(work / "pool", f"valid-{recipe.seed}", VALID_SCREENS, grid, recipe.workers)
    torch.multiprocessing.spawn(_worker, (recipe, tokenizer_folder, work, start), recipe.workers)
    return work / f"cycle-{len(recipe.cycles) - 1}.pt"


def _worker(rank: int, recipe: Recipe, tokenizer_folder: Path, work: Path, start: Path | None) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29541")
    dist.init_process_group("gloo", rank=rank, world_size=recipe.workers, timeout=timedelta(hours=1))
    pools = [
        open_pool(work / "pool", f"train-{recipe.seed}", size, grid)
        for grid, size in zip(GRIDS, recipe.screens, strict=True)
    ]
    valid = [open_pool(work / "pool", f"valid-{recipe.seed}", VALID_SCREENS, grid) for grid in GRIDS]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    trained = PocketForward(make_model(recipe.seed), len(LABELS) + 1)
    if start is not None:
        trained.load_state_dict(torch.load(start), strict=False)  # the heads that are thrown away begin anew
    stage = Stage(rank, recipe, trained, tokenizer, pools, valid)
    for number, cycle in enumerate(recipe.cycles):
        if start is not None and number < recipe.second:
            continue
        file = work / f"cycle-{number}.pt"
        if not file.exists():
            if isinstance(cycle, VisionCycle):
                stage.run_vision(number, cycle)
            else:
                stage.run_joint(number, cycle, work)
            dist.barrier()
            if rank == 0:
                torch.save(trained.state_dict(), file)
            dist.barrier()
        trained.load_state_dict(torch.load(file))
    dist.destroy_process_group()


class Stage:
    """One worker's view of the training: its share of each batch and the shared step."""

    def __init__(
        self,
        rank: int,
        recipe: Recipe,
        trained: PocketForward,
        tokenizer: PreTrainedTokenizerFast,
        pools: list[Pool],
        valid: list[Pool],
    ) -> None:
        self._rank, self._recipe, self._trained = rank, recipe, trained
        self._maker, self._pools, self._valid = RowMaker(tokenizer), pools, valid
        self._share = recipe.batch // recipe.workers
        self._label_tokens = label_tokens(tokenizer)
        # The decoder gains nothing from being compiled: masked attention takes most of its time.
        self._see: Callable[[Tensor], Tensor] = (
            torch.compile(trained.see, dynamic=False) if recipe.compiled else trained.see
        )

    def run_vision(self, number: int, plan: VisionCycle) -> None:
        """One cycle of the vision tower and the thrown-away head, on screens without questions."""
        trained, recipe = self._trained, self._recipe
        trained.model.model.language_model.requires_grad_(False)
        trained.model.lm_head.requires_grad_(False)
        schedule = Schedule(
            self._pools, plan.grids, plan.steps, recipe.batch, 1000 * recipe.seed + 10 * number, 0.0
        )

        def step(index: int) -> dict[str, Tensor]:
            pool, mine = schedule.pool(index), schedule.indices(index, self._rank, self._share)
            cells = torch.from_numpy(pool.cells[mine]).long()
            with torch.autocast("cpu", torch.bfloat16):
                image = self._see(torch.from_numpy(pool.pixels[mine]))
                return {"cells": cell_loss(trained, image, cells, plan.class_weight, plan.everywhere)}

        optimizers = make_optimizers(trained, plan.rate, plan.rate, 2e-3)
        self._loop(f"{number} vision", step, plan.steps, optimizers, lambda _: None)
        self._report_cells()

    def run_joint(self, number: int, plan: JointCycle, work: Path) -> None:
        """One cycle of all weights, on packed questions; writes checkpoints into `work`."""
        trained, recipe = self._trained, self._recipe
        trained.requires_grad_(True)
        seed = 1000 * recipe.seed + 10 * number
        schedule = Schedule(self._pools, plan.grids, plan.steps, recipe.batch, seed, plan.button_share)

        def step(index: int) -> dict[str, Tensor]:
            pool, mine = schedule.pool(index), schedule.indices(index, self._rank, self._share)
            rng = random.Random(f"lesson:{seed}:{index}")
            lesson = self._maker.lesson(pool.grid, rng, plan.history_share, plan.longest)
            seeds = [f"row:{seed}:{index}:{self._rank}:{item}" for item in range(self._share)]
            rows = make_rows(self._maker, pool, mine, lesson, seeds)
            batch = collate(rows, lesson, pool.pixels[mine])
            batch["cells"] = torch.from_numpy(pool.cells[mine]).long()
            with torch.autocast("cpu", torch.bfloat16):
                image = self._see(batch["pixels"])
                hidden, watched = trained.read(batch, image, watch=True)
                assert watched is not None
                answers = batch["labels"] >= 0
                logits = trained.model.lm_head(hidden[answers])
                return {
                    "points": plan.pointing * pointing_loss(watched, batch, plan.with_absent),
                    "places": plan.placing * place_loss(trained, watched, batch, plan.with_absent),
                    "reads": plan.placing * reading_loss(watched, batch),
                    "answer": F.cross_entropy(logits.float(), batch["labels"][answers]),
                    "cells": 0.5 * cell_loss(trained, image, batch["cells"]),
                    "names": 0.5 * alignment_loss(trained, image, batch["cells"], self._label_tokens),
                }

        def after(done: int) -> None:
            if done % recipe.checkpoint_every == 0:
                self._report_answers(plan)
                if self._rank == 0:
                    torch.save(trained.state_dict(), work / f"cycle-{number}-{done}.pt")

        optimizers = make_optimizers(
            trained, plan.rate * plan.vision_rate, plan.rate * 0.02, plan.rate * 3e-3
        )
        self._loop(f"{number} joint", step, plan.steps, optimizers, after, plan.planned)

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
        for pool in self._valid:
            cells = torch.from_numpy(pool.cells[:64]).long()
            out = self._trained.cell_head(self._trained.see(torch.from_numpy(pool.pixels[:64])))
            classes, digits, states = out.split((BACKGROUND + 1, 40, 3), -1)
            shown = cells[..., 0] != BACKGROUND
            right = [(classes.argmax(-1) == cells[..., 0])[shown & (cells[..., 6] > 0)]]
            right += [
                (part.argmax(-1) == cells[..., i + 1])[shown] for i, part in enumerate(digits.split(10, -1))
            ]
            right += [(states.argmax(-1) == cells[..., 5])[shown]]
            shares = [round(100 * r.float().mean().item(), 1) for r in right]
            print(f"valid {pool.grid.cells} cells: class, digits, state", shares, flush=True)

    @torch.no_grad()
    def _report_answers(self, plan: JointCycle, count: int = 32) -> None:
        """Print teacher-forced scores on validation screens, with the image sizes and prompts of a plan."""
        if self._rank:
            return
        for pool, share in zip(self._valid, plan.grids, strict=True):
            if not share:
                continue
            exact: dict[str, list[bool]] = {}
            hits: list[bool] = []
            for index in range(count):
                rng = random.Random(f"valid:{index}")
                lesson = self._maker.lesson(pool.grid, rng, plan.history_share, plan.longest)
                row = self._maker.make(pool.screen(index), random.Random(f"valid:{index}"), lesson)
                batch = collate([row], lesson, pool.pixels[[index]])  # a copy: the pool is read-only
                with torch.autocast("cpu", torch.bfloat16):
                    best = self._trained.logits(batch)[0].argmax(-1)
                for question, given, wanted in answered(row, best):
                    exact.setdefault(question.kind, []).append(bool((given == wanted).all()))
                    if question.box is not None:
                        answer = self._maker.decode(given.tolist())
                        hits.append(inside(tapped_point(answer), question.box))
            shown = {kind: f"{100 * sum(values) / len(values):.1f}" for kind, values in sorted(exact.items())}
            hit = f"{100 * sum(hits) / max(1, len(hits)):.1f} of {len(hits)}"
            print(f"valid {pool.grid.cells} answers: hit {hit}, exact {shown}", flush=True)


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
