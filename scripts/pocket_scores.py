"""Scores of a pocket folder on newly drawn screens, answered one at a time with `generate`.

In: a folder that `from_pretrained` reads, a seed, a number of questions. Out: a table of scores per
question kind. Pictures go through the image processor of transformers and prompts through the chat
template, so nothing of the training code is trusted. This module knows nothing of how the weights came
about.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pocket_questions import Question, action_type, ask, ask_toggle, decorate, inside, tapped_point
from pocket_screens import Screen, make_screen, render
from pocket_vocabulary import SYSTEM_PROMPTS
from transformers import AutoTokenizer, Glm4vForConditionalGeneration
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil


@dataclass
class Scores:
    """Counts over a number of questions, and the failures for a reader."""

    total: int = 0
    actions: int = 0
    exact: int = 0
    targets: int = 0
    hits: int = 0
    kinds: dict[str, list[int]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, question: Question, answer: str) -> None:
        """Count one answer; right is a touch inside the box if there is one, else the exact answer."""
        self.total += 1
        self.exact += answer == question.answer
        self.actions += action_type(answer) == action_type(question.answer)
        is_right = answer == question.answer
        if question.box is not None:
            is_right = action_type(answer) == action_type(question.answer)
            is_right = is_right and inside(tapped_point(answer), question.box)
            self.targets += 1
            self.hits += is_right
        counts = self.kinds.setdefault(question.kind, [0, 0])
        counts[0] += is_right
        counts[1] += 1
        if not is_right:
            self.failures.append(f"{question.text!r}: {answer!r} instead of {question.answer!r}")

    def to_dict(self) -> dict[str, object]:
        """Shares in percent and the counts behind them."""
        return {
            "questions": self.total,
            "action_percent": round(100 * self.actions / self.total, 1),
            "taps": self.targets,
            "hit_percent": round(100 * self.hits / max(1, self.targets), 1),
            "exact_percent": round(100 * self.exact / self.total, 1),
            "kinds": {kind: f"{right}/{total}" for kind, (right, total) in sorted(self.kinds.items())},
        }


class Agent:
    """A pocket folder in fp32 behind one function: picture and messages in, text out."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._processor = Glm4vImageProcessorPil.from_pretrained(folder)
        self._model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answer(self, screen: Screen, scale: int, text: str, system: str | None = None) -> str:
        """Answer one question about a screen drawn at `scale` pixels per dp; includes the terminator."""
        turns: list[dict[str, object]] = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]})
        prompt = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        image = self._processor(images=[render(screen, scale)], return_tensors="pt")
        tokens = int(image["image_grid_thw"].prod()) // 4
        prompt = prompt.replace("<|image|>", "<|image|>" * tokens)
        ids = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self._model.config.image_token_id).int(),
            max_new_tokens=64,
            do_sample=False,
            **image,
        )
        return str(self._tokenizer.decode(out[0, ids.shape[1] :]))


def test_questions(
    seed: str, count: int, toggles_only: bool = False
) -> Iterator[tuple[Screen, Question, str, str | None]]:
    """Held-out screens, one question each, with the text part as sent and the system prompt."""
    done = index = 0
    while done < count:
        screen = make_screen(f"{seed}:{index}", "list" if toggles_only else None)
        rng = random.Random(f"{seed}:{index}")
        index += 1
        question = ask_toggle(screen, rng) if toggles_only else ask(screen, rng)
        if question is None:
            continue
        done += 1
        yield (
            screen,
            question,
            decorate(question.text, rng),
            rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None,
        )


def evaluate(folder: Path, seed: str, count: int, scale: int, toggles_only: bool = False) -> Scores:
    """Score a pocket folder on `count` held-out questions about screens drawn at `scale`."""
    agent, scores = Agent(folder), Scores()
    for screen, question, text, system in test_questions(seed, count, toggles_only):
        scores.add(question, agent.answer(screen, scale, text, system))
    return scores
