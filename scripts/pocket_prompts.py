#!/usr/bin/env python3
"""Write newly drawn pocket screens as prompts for `autoglm record`, or as a calibration set.

In: a seed and a number. Out: a JSON Lines file with one request a line: the screen as a data URI, the text
as a client sends it, and the box that a right answer touches. The screens are drawn by the code that the
pocket model was trained with, from seeds that training did not use. Forms (see `pocket_clients`) take turns.

    scripts/pocket_prompts.py --count 200 -o pocket.jsonl
    scripts/pocket_prompts.py --seed calibration --count 48 --scale 1 --answers -o calibration.jsonl
    autoglm record -o ref.safetensors --prompts pocket.jsonl
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pocket_canvas import render
from pocket_clients import FORMS, converse
from pocket_screens import make_screen

MAX_TOKENS = 64
"""The longest answers have about 30."""
CHARACTERS_PER_TOKEN = 1.8
"""Of system prompts, Chinese and English together; only their length depends on it."""


def prompts(
    seed: str, count: int, scale: int = 2, forms: Sequence[str] = ("plain",), *, answers: bool = False
) -> list[dict[str, Any]]:
    """One request about each of `count` screens, drawn at `scale` pixels per dp.

    Args:
        seed: of the screens and questions.
        count: screens.
        scale: pixels per dp.
        forms: of the conversations, taking turns.
        answers: whether the right answer follows as the last message.
    """
    found: list[dict[str, Any]] = []
    index = 0
    while len(found) < count:
        name = f"{seed}:{index}"
        form = forms[len(found) % len(forms)]
        screen = make_screen(name, "list" if form == "toggles" else None)
        conversation = converse(form, screen, random.Random(name), _tokens)
        index += 1
        if conversation is None:
            continue
        question = conversation.question
        image = {"type": "image_url", "image_url": {"url": data_uri(render(screen, scale))}}
        messages = conversation.messages(image)
        if answers:
            messages.append({"role": "assistant", "content": question.answer})
        label = question.kind if form == "plain" else f"{form}-{question.kind}"
        prompt = {"name": f"{label}-{index - 1:04d}", "messages": messages, "max_tokens": MAX_TOKENS}
        if question.box is not None:
            prompt["box"] = list(question.box)
        found.append(prompt)
    return found


def _tokens(text: str) -> int:
    """About how many tokens the pocket model's tokenizer makes of a text."""
    return round(len(text) / CHARACTERS_PER_TOKEN)


def data_uri(image: Image.Image) -> str:
    """A picture as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write newly drawn pocket screens as prompts.")
    parser.add_argument("--seed", default="parity", help="of the screens (default: parity)")
    parser.add_argument("--count", type=int, default=200, help="screens (default: 200)")
    parser.add_argument("--scale", type=int, default=2, help="pixels per dp (default: 2)")
    parser.add_argument(
        "--forms", default="plain", help=f"of the requests, with commas between: {', '.join(FORMS)}"
    )
    parser.add_argument("--answers", action="store_true", help="add the right answer as the last message")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, .jsonl")
    arguments = parser.parse_args()
    forms = arguments.forms.split(",")
    if unknown := sorted(set(forms) - set(FORMS)):
        parser.error(f"--forms has {unknown[0]!r}, must be of {', '.join(FORMS)}")
    made = prompts(arguments.seed, arguments.count, arguments.scale, forms, answers=arguments.answers)
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in made]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} prompts: {arguments.output}")


if __name__ == "__main__":
    main()
