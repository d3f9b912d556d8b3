#!/usr/bin/env python3
"""Write newly drawn pocket screens as prompts for `autoglm record`.

In: a seed and a number. Out: a JSON Lines file with one question a line: the screen as a data URI, the text
as a client sends it, and the box that a right answer touches. The screens are drawn by the code that the
pocket model was trained with, from seeds that training did not use.

    scripts/pocket_prompts.py --count 200 -o pocket.jsonl
    autoglm record -o ref.safetensors --prompts pocket.jsonl
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image
from pocket_questions import ask, decorate
from pocket_screens import make_screen, render
from pocket_vocabulary import SYSTEM_PROMPTS

MAX_TOKENS = 64
"""The longest answers have about 30."""


def prompts(seed: str, count: int, scale: int = 2) -> list[dict[str, Any]]:
    """One question about each of `count` screens, drawn at `scale` pixels per dp."""
    found = []
    for index in range(count):
        rng = random.Random(f"{seed}:{index}")
        screen = make_screen(f"{seed}:{index}")
        question = ask(screen, rng)
        content = [
            {"type": "image_url", "image_url": {"url": data_uri(render(screen, scale))}},
            {"type": "text", "text": decorate(question.text, rng)},
        ]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if rng.random() < 0.3:
            messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        prompt = {"name": f"{question.kind}-{index:04d}", "messages": messages, "max_tokens": MAX_TOKENS}
        if question.box is not None:
            prompt["box"] = list(question.box)
        found.append(prompt)
    return found


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
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, .jsonl")
    arguments = parser.parse_args()
    lines = [json.dumps(prompt, ensure_ascii=False) for prompt in prompts(arguments.seed, arguments.count)]
    arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} prompts: {arguments.output}")


if __name__ == "__main__":
    main()
