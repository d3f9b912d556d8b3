"""What a server takes from a stranger at most.

In: values of a caller. Out: `Limits`, checked. Knows nothing of how they are enforced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral

from autoglm_edge.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all together.

    Attributes:
        queue: requests that may wait while others are answered; more are refused with 429.
        body_bytes: of a request's body.
        body_seconds: in which it must have come.
        json_items: values in it; a JSON value of three bytes takes seventy in memory.
        json_depth: objects and lists within each other.
        text_bytes: of all text in a request, before it is counted in tokens.
        messages: in a conversation.
        parts: in all of its messages together.
        images: pictures in a request.
        image_bytes: of one picture, packed.
        image_pixels: of one picture; read from its header, before it is unpacked.
        request_pixels: of all pictures of a request together.
        audios: sounds in a request.
        audio_seconds: of all sounds of a request together.
        audio_queue: sounds that may wait while one is heard; more are refused with 429.
        choices: answers that one request may ask for.
        stops: strings that end an answer.
        stop_characters: of one of them.
        send_seconds: after which a client that takes no bytes is left alone.
    """

    queue: int = 32
    body_bytes: int = 32_000_000
    body_seconds: float = 60.0
    json_items: int = 200_000
    json_depth: int = 64
    text_bytes: int = 500_000
    messages: int = 1000
    parts: int = 4000
    images: int = 10
    image_bytes: int = 20_000_000
    image_pixels: int = 16_000_000
    request_pixels: int = 64_000_000
    audios: int = 10
    audio_seconds: float = 300.0
    audio_queue: int = 8
    choices: int = 8
    stops: int = 16
    stop_characters: int = 512
    send_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("seconds"):
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                    raise RequestError(f"{field.name} is {value!r}, must be a number of seconds above 0")
            elif isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise RequestError(f"{field.name} is {value!r}, must be a whole number of at least 1")
