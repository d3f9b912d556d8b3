"""A conversation on the command line: what was said so far, and pictures that wait for the next question.

In: text and pictures. Out: messages as `Engine.chat` takes them. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Conversation:
    """Messages so far, and pictures that wait for the next one."""

    system: str | None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.images = []

    def ask(self, text: str) -> None:
        """Add what the user says: pictures first, as the phone agent sends them."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if text:
            parts.append({"type": "text", "text": text})
        self.messages.append({"role": "user", "content": parts})
        self.images = []

    def take_back(self) -> None:
        """Forget the last thing the user said; its pictures wait again."""
        parts = self.messages.pop()["content"]
        self.images = [part["image"] for part in parts if part["type"] == "image"]


def load_images(paths: Sequence[Path]) -> list[Image]:
    """Pictures of the command line, as the engine will see them.

    Raises:
        ImageError: a file is missing or no picture.
    """
    from autoglm_edge.runtime.prompt.image import load_image

    return [load_image(path) for path in paths]
