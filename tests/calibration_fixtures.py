"""Calibration sets that tests write: conversations as JSON Lines, with pictures as data URIs."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

ANSWER = '<think>there</think><answer>do(action="Tap", element=[500,20])</answer>'


def user(text: str, *pictures: Image.Image) -> dict[str, Any]:
    """A user's turn, pictures first."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": data_uri(picture)} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str = ANSWER) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_set(path: Path, *conversations: list[dict[str, Any]]) -> Path:
    """A file of these conversations."""
    lines = [{"name": f"text-{number}", "messages": item} for number, item in enumerate(conversations)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def write_usual_set(path: Path, pictures: list[Image.Image]) -> Path:
    """Text, pictures, an answer, and history: what a set is made of."""
    return write_set(
        path,
        [user("打开设置 and tell me what is there. " * 9), assistant()],
        [user("What is it?", pictures[0], pictures[1])],
        [
            {"role": "system", "content": "You operate a phone."},
            user("Open the settings", pictures[1]),
            assistant(),
            user("and now?"),
            assistant(),
        ],
    )
