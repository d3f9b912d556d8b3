"""How much a server takes, of one request and of all together.

In: the command line of `autoglm serve`. Out: `Limits` of the server, whose defaults hold where nothing was
said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from autoglm_edge.commands.quantities import read_bytes

from .choice import gathered

if TYPE_CHECKING:
    from autoglm_edge.server.limits import Limits


@dataclass(frozen=True)
class LimitChoice:
    """What was said of amounts; None leaves it to `Limits` and `Settings`.

    Attributes:
        max_concurrency: answers that are given at a time.
        max_queue: requests that may wait.
        max_body_bytes: of one request, like all up to `max_audio_seconds`.
        max_messages: see there.
        max_images: see there.
        max_image_pixels: of one picture.
        max_audio_seconds: of all sounds.
        grace: seconds that an answer under way may still take after a signal.
    """

    max_concurrency: int
    max_queue: int | None
    max_body_bytes: int | None
    max_messages: int | None
    max_images: int | None
    max_image_pixels: int | None
    max_audio_seconds: float | None
    grace: float | None

    def limits(self) -> Limits:
        """The limits of requests.

        Raises:
            RequestError: one is out of range.
        """
        from autoglm_edge.server.limits import Limits

        said: dict[str, Any] = {
            "queue": self.max_queue,
            "body_bytes": self.max_body_bytes,
            "messages": self.max_messages,
            "images": self.max_images,
            "image_pixels": self.max_image_pixels,
            "audio_seconds": self.max_audio_seconds,
        }
        return Limits(**{name: value for name, value in said.items() if value is not None})


limit_options = gathered(
    LimitChoice,
    "limits",
    click.option(
        "--max-concurrency",
        type=click.IntRange(1, 64),
        default=4,
        show_default=True,
        metavar="N",
        help="Answers that are given at a time; each keeps a context of its own in memory.",
    ),
    click.option(
        "--max-queue",
        type=click.IntRange(min=1),
        metavar="N",
        help="Requests that may wait; more get status 429. [default: 32]",
    ),
    click.option(
        "--max-body-bytes", callback=read_bytes, metavar="SIZE", help="Of one request. [default: 32MB]"
    ),
    click.option(
        "--max-messages", type=click.IntRange(min=1), metavar="N", help="Of one request. [default: 1000]"
    ),
    click.option(
        "--max-images", type=click.IntRange(min=1), metavar="N", help="Of one request. [default: 10]"
    ),
    click.option(
        "--max-image-pixels",
        type=click.IntRange(min=1),
        metavar="N",
        help="Of one picture, before it is shrunk. [default: 16000000]",
    ),
    click.option(
        "--max-audio-seconds",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Of all sounds of one request. [default: 300]",
    ),
    click.option(
        "--grace",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="What an answer under way may still take after a signal. [default: 30]",
    ),
)
