"""Train, save and score the pocket model.

In: a work folder for drawn screens and checkpoints. Out: a folder with everything `from_pretrained` and an
exporter read, a sample screenshot and its question. The weights depend only on the options below (and, in
the last bits, on the machine's arithmetic). This command knows no details of screens, questions or losses.

    python scripts/train_pocket.py --out /tmp/pocket --work /tmp/pocket_work
    python scripts/train_pocket.py --out /tmp/pocket --work /tmp/pocket_work --start older_pocket
    python scripts/train_pocket.py --out autoglm_edge/pocket --evaluate-only --questions 500
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch
from glm_tokens import EOS_TOKENS
from pocket_canvas import Screen, render
from pocket_clients import SHORT_PROMPTS, TRAINED
from pocket_model import PocketForward, make_model
from pocket_questions import ask, ask_tap
from pocket_recipe import Recipe
from pocket_scores import EXAMS, Agent, Scores, evaluate
from pocket_screens import make_screen
from pocket_start import carry_over
from pocket_tokenizer import TOKEN_IDS, save_tokenizer, train_tokenizer
from pocket_training import train
from pocket_vocabulary import LABELS
from transformers import GenerationConfig, Glm4vForConditionalGeneration

TOKENIZER_SCREENS = 4000
TEST_SEED = "test-2"
SAMPLE_SCALE = 3
SAMPLE_PHRASE = "打开{}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the finished model.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/pocket_work"), show_default=True)
@click.option(
    "--start", type=click.Path(path_type=Path), help="Do the second training only, from this pocket folder."
)
@click.option(
    "--seed", default=Recipe.seed, show_default=True, help="Seed of screens, questions and weights."
)
@click.option("--workers", default=Recipe.workers, show_default=True, help="Processes of one thread each.")
@click.option(
    "--compile/--no-compile", "compiled", default=True, show_default=True, help="Use torch.compile."
)
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Save this file of the work folder; do not train."
)
@click.option("--evaluate-only", is_flag=True, help="Score the folder given with --out.")
@click.option("--questions", default=500, show_default=True, help="Held-out questions of the largest exams.")
def main(
    out: Path,
    work: Path,
    start: Path | None,
    seed: int,
    workers: int,
    compiled: bool,
    weights: Path | None,
    evaluate_only: bool,
    questions: int,
) -> None:
    """Train the pocket model, write it to --out and score it on new screens."""
    recipe = replace(Recipe(), seed=seed, workers=workers, compiled=compiled)
    if not evaluate_only:
        out.mkdir(parents=True, exist_ok=True)
        started = time.time()
        begin = None
        tokenizer = train_tokenizer(tokenizer_texts())
        if start is not None and weights is None:
            work.mkdir(parents=True, exist_ok=True)
            begin = work / "start.pt"
            torch.save(carry_over(start, tokenizer, seed), begin)
        save_tokenizer(tokenizer, out)
        save_model(weights or train(recipe, out, work, begin), seed, out)
        save_sample(out)
        click.echo(f"saved {out} after {(time.time() - started) / 60:.1f} min", err=True)
    agent = Agent(out)
    report = {exam.name: _told(exam.name, evaluate(agent, exam, TEST_SEED, questions)) for exam in EXAMS}
    click.echo(json.dumps(report, ensure_ascii=False))


def tokenizer_texts() -> Iterator[str]:
    """Texts the tokenizer learns from; the same on every run."""
    manner = replace(TRAINED.manner, noise=None)
    for index in range(TOKENIZER_SCREENS):
        screen, rng = make_screen(f"tok:{index}"), random.Random(index)
        for _ in range(4):
            question = ask(screen, rng, manner)
            yield TRAINED.decorate(question.text, rng)
            yield from (question.think, question.action)
        yield SHORT_PROMPTS[index % len(SHORT_PROMPTS)]
        if index % 40 == 0:
            yield TRAINED.source.system_prompt(rng, 4000, len)


def save_model(weights: Path, seed: int, out: Path) -> None:
    """Write config.json, generation_config.json and bf16 weights from a training file."""
    trained = PocketForward(make_model(seed), len(LABELS) + 1)
    trained.load_state_dict(torch.load(weights))
    write_model(trained.model, out)


def write_model(model: Glm4vForConditionalGeneration, out: Path) -> None:
    """Save a model as bf16 with its generation settings."""
    model = model.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[TOKEN_IDS[token] for token in EOS_TOKENS],
        pad_token_id=TOKEN_IDS["<|endoftext|>"],
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def sample_screen() -> Screen:
    """The first held-out home screen with at least 16 apps, the settings among them."""
    for index in range(10_000):
        screen = make_screen(f"sample:{index}", "home")
        if len(screen.elements) >= 16 and any(element.label == "Settings" for element in screen.elements):
            return screen
    raise AssertionError("no such screen")


def save_sample(out: Path) -> None:
    """Write screenshot.png (1080x2400) and example.json, a question about it."""
    screen = sample_screen()
    render(screen, SAMPLE_SCALE).save(out / "screenshot.png", optimize=True)
    question = ask_tap(screen, "Settings", "zh", SAMPLE_PHRASE)
    example = {
        "instruction": question.text,
        "expected": question.answer.removesuffix("</answer>"),
        "box": list(question.box or ()),
    }
    (out / "example.json").write_text(
        json.dumps(example, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )


def _told(name: str, scores: Scores) -> dict[str, object]:
    for failure in scores.failures:
        click.echo(f"{name} {failure}", err=True)
    return scores.to_dict()


if __name__ == "__main__":
    main()
