"""Scores of a pocket folder on newly drawn screens, answered one at a time with `generate`.

In: a folder that `from_pretrained` reads, and `Exam`s. Out: a table of scores per question kind for each.
Pictures go through the image processor of transformers and prompts through the chat template, so nothing of
the training code is trusted. This module knows nothing of how the weights came about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pocket_canvas import Screen, render
from pocket_clients import Conversation, converse
from pocket_questions import Question, action_type, inside, tapped_point
from pocket_screens import make_screen
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


@dataclass(frozen=True)
class Exam:
    """Newly drawn screens with one question each.

    Attributes:
        name: of the row in a table.
        form: of the conversations, see `pocket_clients.FORMS`.
        scale: pixels per dp of the screenshots.
        tokens: image token budget, None for the model's own.
        share: of the number of questions asked for.
    """

    name: str
    form: str = "plain"
    scale: int = 3
    tokens: int | None = None
    share: float = 0.4


EXAMS = (
    Exam("trained wording, 360x800 source", scale=1, share=1.0),
    Exam("trained wording, 1080x2400 source", share=1.0),
    Exam("trained wording, budget 112", tokens=112),
    Exam("trained wording, budget 81", tokens=81),
    Exam("new wording", "worded"),
    Exam("new wording, budget 112", "worded", tokens=112),
    Exam("new wording, budget 81", "worded", tokens=81),
    Exam("new system prompt of 2,000 tokens, Chinese", "system-zh"),
    Exam("new system prompt of 2,000 tokens, English", "system-en"),
    Exam("new wording after other tasks", "tasks"),
    Exam("new wording, later step of a task", "steps"),
    Exam("new wording, switches only", "toggles"),
)


class Agent:
    """A pocket folder in fp32 behind one function: picture and conversation in, text out."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._folder = folder
        self._processors: dict[int | None, Glm4vImageProcessorPil] = {}
        self._model = Glm4vForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def answer(
        self, screen: Screen, scale: int, conversation: Conversation, budget: int | None = None
    ) -> str:
        """Answer one request about a screen drawn at `scale` pixels per dp; includes the terminator."""
        turns = conversation.messages({"type": "image"})
        prompt = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        image = self._processor(budget)(images=[render(screen, scale)], return_tensors="pt")
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

    def _processor(self, budget: int | None) -> Glm4vImageProcessorPil:
        if budget not in self._processors:
            made = Glm4vImageProcessorPil.from_pretrained(self._folder)
            if budget is not None:
                made.size["longest_edge"] = budget * PIXELS_PER_TOKEN
            self._processors[budget] = made
        return self._processors[budget]


PIXELS_PER_TOKEN = 2 * 28 * 28
"""Of an image budget, which counts a still twice."""


def requests(
    seed: str, count: int, form: str, tokens: Callable[[str], int]
) -> Iterator[tuple[Screen, Conversation]]:
    """Held-out screens, one request each; `tokens` counts the tokens of a text."""
    done = index = 0
    while done < count:
        screen = make_screen(f"{seed}:{index}", "list" if form == "toggles" else None)
        conversation = converse(form, screen, random.Random(f"{seed}:{index}"), tokens)
        index += 1
        if conversation is not None:
            done += 1
            yield screen, conversation


def evaluate(agent: Agent, exam: Exam, seed: str, questions: int) -> Scores:
    """Score a model on an exam of its share of so many questions."""
    scores = Scores()
    count = max(1, round(questions * exam.share))
    for screen, conversation in requests(f"{seed}-{exam.name}", count, exam.form, agent.count):
        scores.add(conversation.question, agent.answer(screen, exam.scale, conversation, exam.tokens))
    return scores
