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

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from pocket_model import PocketForward, make_model, make_optimizers, rate_factor
from pocket_pool import BACKGROUND, Pool, open_pool
from pocket_questions import inside, tapped_point
from pocket_rows import RowDataset, RowMaker, shuffled
from pocket_tokenizer import VOCABULARY_SIZE
from pocket_vocabulary import LABELS
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the code: steps, seeds and rates.

    One step takes `batch` screens over all workers.
    """

    seed: int = 1
    screens: int = 32000
    workers: int = 2
    batch: int = 16
    vision_steps: int = 2400
    joint_steps: int = 2200
    checkpoint_every: int = 550
    report_every: int = 20
    compiled: bool = True


def train(recipe: Recipe, tokenizer_folder: Path, work: Path) -> Path:
    """Run both stages; returns the file with the weights.

    A finished first stage in the work folder (`vision.pt`) is used again.
    """
    pool_folder = work / "pool"
    open_pool(pool_folder, f"train-{recipe.seed}", recipe.screens, recipe.workers)
    open_pool(pool_folder, f"valid-{recipe.seed}", 256, recipe.workers)
    torch.multiprocessing.spawn(_worker, (recipe, tokenizer_folder, work), recipe.workers)
    return work / "joint.pt"


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
    vision_file = work / "vision.pt"
    if not vision_file.exists():
        stage.run_vision()
        dist.barrier()
        if rank == 0:
            torch.save(trained.state_dict(), vision_file)
        dist.barrier()
    trained.load_state_dict(torch.load(vision_file))
    stage.run_joint(work)
    if rank == 0:
        torch.save(trained.state_dict(), work / "joint.pt")
    dist.barrier()
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

    def run_vision(self) -> None:
        """Stage one: the vision tower and the thrown-away head, on screens without questions."""
        trained, recipe = self._trained, self._recipe
        trained.model.model.language_model.requires_grad_(False)
        trained.model.lm_head.requires_grad_(False)
        order = shuffled(len(self._pool.pixels), recipe.vision_steps * recipe.batch, recipe.seed)

        def loss(pixels: Tensor, cells: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return trained.cell_loss(trained.see(pixels), cells)

        compiled = self._compile(loss)

        def step(number: int) -> dict[str, Tensor]:
            start = number * recipe.batch + self._rank * self._share
            indices = order[start : start + self._share]
            pixels = torch.from_numpy(self._pool.pixels[indices])
            return {"cells": compiled(pixels, torch.from_numpy(self._pool.cells[indices]).long())}

        self._loop(
            "vision", step, recipe.vision_steps, make_optimizers(trained, 0.02, 0.02, 2e-3), lambda _: None
        )
        self._report_cells()

    def run_joint(self, work: Path) -> None:
        """Stage two: all weights, on packed questions; writes checkpoints into `work`."""
        trained, recipe = self._trained, self._recipe
        trained.requires_grad_(True)
        order = shuffled(len(self._pool.pixels), recipe.joint_steps * recipe.batch, recipe.seed + 1)
        rows = RowDataset(self._pool, RowMaker(self._tokenizer), recipe.seed, order)

        see = self._compile(trained.see)  # the decoder gains nothing: masked attention takes most of its time

        def step(number: int) -> dict[str, Tensor]:
            start = number * recipe.batch + self._rank * self._share
            batch = torch.utils.data.default_collate(
                [rows[item] for item in range(start, start + self._share)]
            )
            with torch.autocast("cpu", torch.bfloat16):
                image = see(batch["pixels"])
                hidden = trained.read(*trained.decoder_inputs(batch, image))
                answers = batch["labels"] >= 0
                logits = trained.model.lm_head(hidden[answers])
                return {
                    "answer": F.cross_entropy(logits.float(), batch["labels"][answers]),
                    "cells": 0.3 * trained.cell_loss(image, batch["cells"]),
                    "names": 0.5 * trained.alignment_loss(image, batch["cells"], self._label_tokens),
                }

        def after(number: int) -> None:
            if number % recipe.checkpoint_every == 0:
                self._report_answers()
                if self._rank == 0:
                    torch.save(trained.state_dict(), work / f"joint-{number}.pt")

        self._loop("joint", step, recipe.joint_steps, make_optimizers(trained, 0.005, 0.02, 3e-3), after)

    def _loop(
        self,
        name: str,
        step: Callable[[int], dict[str, Tensor]],
        steps: int,
        optimizers: list[torch.optim.Optimizer],
        after: Callable[[int], None],
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
            factor = rate_factor(number, steps, warm_up=80)
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
        right = [(classes.argmax(-1) == cells[..., 0])[shown]]
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
