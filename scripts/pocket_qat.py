#!/usr/bin/env python3
"""Quantization-aware training of the pocket model: what it buys over rounding alone.

In: a pocket folder, a recipe, and drawn screens (made if they are not there). Out: a folder like the first,
whose weights lose little when an export rounds them with that recipe. Every step rounds the weights as the
export does, by the same code, and passes gradients straight through (Bengio et al. 2013, arXiv:1308.3432);
the student learns to give the answers' probabilities that the float weights give (Hinton et al. 2015,
arXiv:1503.02531). This module knows nothing of graphs or bundles.

Before and after, new screens are answered with the rounded weights, in float32, and compared with the float
weights: the last line of output is one JSON document.

    python scripts/pocket_qat.py --recipe int3 --out /tmp/pocket_qat --work /tmp/pocket_work
    autoglm-export /tmp/pocket_qat --recipe int3 -o /tmp/pocket_qat_int3
"""

from __future__ import annotations

import copy
import json
import platform
import random
import shutil
import time
from datetime import date
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pocket_batches import Schedule, answered, collate, make_rows
from pocket_canvas import render
from pocket_model import PocketForward, make_model
from pocket_optimizers import rate_factor
from pocket_pool import GRIDS, open_pool, shrink
from pocket_questions import inside, tapped_point
from pocket_recipe import ALL, Recipe
from pocket_rows import RowMaker
from pocket_screens import make_screen
from pocket_vocabulary import LABELS
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_pocket import write_model
from transformers import AutoTokenizer, Glm4vForConditionalGeneration

from autoglm_edge.quantize import BlockFormat, dequantize_rows, quantize_rows, resolve


class Rounded(nn.Module):
    """A weight as an export stores it; gradients go to the float weight unchanged."""

    def __init__(self, form: BlockFormat) -> None:
        super().__init__()
        self.form = form

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, each output row rounded in blocks; kernels with their channels last, as exports do."""
        laid = weight.detach().movedim(1, -1)
        rows = laid.flatten(1).numpy()
        stored = dequantize_rows(quantize_rows(rows, self.form), self.form, rows.shape[1])
        rounded = torch.from_numpy(stored).view(laid.shape).movedim(-1, 1)
        return weight + (rounded - weight.detach())


def round_weights(model: Glm4vForConditionalGeneration, recipe_name: str) -> int:
    """Let every weight that the recipe quantizes be rounded whenever it is used; returns how many."""
    recipe = resolve(recipe_name)
    config = model.config
    recipe = recipe.for_layers(
        decoder=config.text_config.num_hidden_layers, vision=config.vision_config.depth
    )
    names = [name for name, _ in model.named_parameters()]
    count = 0
    for name in names:
        form = recipe.format_for(name)
        if form is not None:
            owner, _, last = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(owner), last, Rounded(form), unsafe=True)
            count += 1
    return count


def learn(
    teacher: PocketForward, student: PocketForward, maker: RowMaker, work: Path, steps: int, rate: float
) -> None:
    """Train the student to give the teacher's probabilities at the answers of packed questions."""
    defaults = Recipe()
    pools = [
        open_pool(work / "pool", f"train-{defaults.seed}", size, grid)
        for grid, size in zip(GRIDS, defaults.screens, strict=True)
    ]
    seed = 7000
    schedule = Schedule(pools, ALL, steps, defaults.batch, seed, 0.2)
    parameters = list(student.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.time()
    for index in range(steps):
        pool, mine = schedule.pool(index), schedule.indices(index, 0, defaults.batch)
        lesson = maker.lesson(pool.grid, random.Random(f"qat:{seed}:{index}"), 0.2, 600)
        seeds = [f"qat:{seed}:{index}:{item}" for item in range(defaults.batch)]
        batch = collate(make_rows(maker, pool, mine, lesson, seeds), lesson, pool.pixels[mine])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted = teacher.logits(batch)[0].float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16), parametrize.cached():
            got = student.logits(batch)[0].float().log_softmax(-1)
        loss = F.kl_div(got, wanted, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate * rate_factor(index, steps, warm_up=20)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (index + 1) % 20 == 0:
            speed = (index + 1) * defaults.batch / (time.time() - started)
            click.echo(f"{index + 1}/{steps} KL {loss.item():.5f} {speed:.1f} screens/s", err=True)


@torch.no_grad()
def score(teacher: PocketForward, student: PocketForward, maker: RowMaker, screens: int) -> dict[str, float]:
    """Compare the student with the teacher on new screens with questions in the trained wording.

    Returns:
        Mean divergence in nats and share of equal likeliest tokens over answer tokens, and the share of
        touches that land in the box, all teacher-forced.
    """
    divergences, equal = [], []
    hits: list[bool] = []
    lesson = maker.lesson(GRIDS[0], random.Random(0), 0.0, 40)
    for index in range(screens):
        screen = make_screen(f"qat-test:{index}")
        row = maker.make(screen, random.Random(f"qat-test:{index}"), lesson)
        batch = collate([row], lesson, shrink(render(screen, 2), lesson.grid)[None].copy())
        wanted, got = (model.logits(batch)[0].log_softmax(-1) for model in (teacher, student))
        divergences.append((wanted.exp() * (wanted - got)).sum(-1))
        equal.append(wanted.argmax(-1) == got.argmax(-1))
        for question, given, _ in answered(row, got.argmax(-1)):
            if question.box is not None:
                hits.append(inside(tapped_point(maker.decode(given.tolist())), question.box))
    return {
        "answer_tokens": len(torch.cat(equal)),
        "mean_kl": torch.cat(divergences).mean().item(),
        "top1": torch.cat(equal).float().mean().item(),
        "touches": len(hits),
        "hits": sum(hits) / len(hits),
    }


@click.command()
@click.option(
    "--model", type=click.Path(path_type=Path), default=Path("autoglm_edge/pocket"), show_default=True
)
@click.option(
    "--recipe", default="int3", show_default=True, help="Preset or TOML file that the export will use."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the trained model.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/pocket_work"), show_default=True)
@click.option("--steps", default=300, show_default=True, help="Steps of 16 screens.")
@click.option("--screens", default=300, show_default=True, help="New screens to compare on.")
@click.option("--rate", default=3e-4, show_default=True, help="Peak learning rate.")
def main(model: Path, recipe: str, out: Path, work: Path, steps: int, screens: int, rate: float) -> None:
    """Fine-tune a pocket model for a recipe."""
    torch.manual_seed(0)
    np.random.seed(0)
    net = Glm4vForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    forward = PocketForward(make_model(0), len(LABELS) + 1)
    forward.model = net
    teacher = copy.deepcopy(forward).eval().requires_grad_(False)
    count = round_weights(net, recipe)
    click.echo(f"{count} weights are rounded", err=True)
    maker = RowMaker(AutoTokenizer.from_pretrained(model))
    before = score(teacher, forward, maker, screens)
    learn(teacher, forward, maker, work, steps, rate)
    after = score(teacher, forward, maker, screens)
    for module in net.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    shutil.copytree(model, out, dirs_exist_ok=True)
    write_model(net, out)
    click.echo(f"saved {out}", err=True)
    settings = {"recipe": recipe, "steps": steps, "rate": rate, "screens": screens}
    where = {"date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
    click.echo(json.dumps({**settings, **where, "rounded": before, "trained": after}))


if __name__ == "__main__":
    main()
