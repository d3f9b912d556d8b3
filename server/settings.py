"""How a server is set up: names, keys, limits, what it may fetch.

In: values of a caller. Out: `Settings`, checked. Knows nothing of engines and sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoglm_edge.errors import RequestError
from autoglm_edge.speech.transcript import Listener

from .asking.content import Fetch
from .gate.access import LOCAL_NAMES, Keys
from .limits import Limits
from .replying.responses import PATIENCE_SECONDS, PING_SECONDS

AGENT_NAME = "autoglm-phone-9b"
"""What the phone agent's client asks for unless it is told otherwise."""
MAX_NAME = 128


@dataclass(frozen=True)
class Settings:
    """One server.

    Attributes:
        names: that requests may call the model by; the first one is its own.
        keys: of which a request must show one; none if empty.
        limits: of requests.
        hosts: names that a Host header may have; None for any.
        origins: web pages that may read answers; none if empty.
        fetch: gets pictures from URLs; None refuses them.
        listener: hears sounds; None refuses them.
        ping_s: between two signs of life to a client that waits.
        patience_s: before the first of them, where an answer is not streamed.
        grace_s: in which the answer under way may end when the server stops.
    """

    names: tuple[str, ...]
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    hosts: frozenset[str] | None = LOCAL_NAMES
    origins: tuple[str, ...] = ()
    fetch: Fetch | None = None
    listener: Listener | None = None
    ping_s: float = PING_SECONDS
    patience_s: float = PATIENCE_SECONDS
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.names:
            raise RequestError("a server needs a name for its model")
        for name in self.names:
            if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
                raise RequestError(
                    f"the model's name {name[:MAX_NAME]!r} must have 1 to {MAX_NAME} characters"
                )
        for origin in self.origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise RequestError(f"the origin {origin!r} must be like https://app.example.org, or *")
        if "*" in self.origins and not self.keys:
            raise RequestError("every web page may ask (--allow-origin '*'); give a key, or name the origins")
        for name in ("ping_s", "patience_s", "grace_s"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} is {getattr(self, name)!r}, must be seconds above 0")


def model_names(bundle: Path, given: Sequence[str]) -> tuple[str, ...]:
    """The names of a bundle: those that were given, else its folder's and the one of the phone agent."""
    if given:
        return tuple(dict.fromkeys(given))
    own = bundle.resolve().name
    return tuple(dict.fromkeys((own if own and own.isprintable() else AGENT_NAME, AGENT_NAME)))
