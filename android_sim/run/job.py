"""What the child is to do: open a bundle, answer a prompt, and compare itself with a recorded reference.

In: a caller's values, checked; or the JSON that the parent wrote. Out: a `Job`. Opens no engine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.prepared import Tell, prepare, prepared_state
from autoglm_edge.runtime.plan import PREPARED_PARTS, plan_model
from autoglm_edge.runtime.prompt.template import IMAGE_LAYOUTS, ImageLayout
from autoglm_edge.runtime.session import Prefill, SessionOptions, Weights

LIMIT_BYTES = 256 << 20
"""Largest job that is read: a few pictures as data URIs."""
Check = tuple[Callable[[Any], bool], str]


@dataclass(frozen=True)
class Job:
    """One run of the runtime.

    Attributes:
        bundle: its folder.
        messages: OpenAI-style, images as paths or data URIs: what JSON can hold.
        context: tokens that the engine holds; None for its default.
        max_tokens: of the answer.
        max_image_tokens: of a picture; None for the bundle's.
        image_layout: what stands between picture and text; see runtime.prompt.template.
        threads: of one operator; 0 for the runtime's choice.
        weights: as in SessionOptions.
        prefill: as in SessionOptions.
        prepare: the child itself makes prepared weights, inside its limits, if the runtime wants them.
        reference: file of `autoglm record` to compare with; None for none.
        cases: names of the reference's prompts; empty for all.
        temperature: of sampling; 0 takes the likeliest token.
        seed: of sampling.

    Raises:
        SimulationError: a value has the wrong type or range.
    """

    bundle: Path
    messages: tuple[Mapping[str, Any], ...]
    context: int | None = None
    max_tokens: int = 16
    max_image_tokens: int | None = None
    image_layout: ImageLayout = "plain"
    threads: int = 0
    weights: Weights = "auto"
    prefill: Prefill = "auto"
    prepare: bool = False
    reference: Path | None = None
    cases: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (is_fine, wanted) in _CHECKS.items():
            if not is_fine(value := getattr(self, name)):
                raise SimulationError(f"{name} of a job is {value!r}, must be {wanted}")
        try:
            json.dumps(self.messages)
        except (TypeError, ValueError, RecursionError) as error:
            raise SimulationError(
                f"the messages of a job cannot be written down ({error}); give images as paths or data URIs"
            ) from error

    @classmethod
    def ask(cls, bundle: Path, prompt: str, images: tuple[Path, ...] = (), **others: Any) -> Job:
        """A job of one question, with pictures before its text; `others` are fields of Job."""
        parts: list[dict[str, Any]] = [
            {"type": "image", "image": str(Path(image).absolute())} for image in images
        ]
        parts.append({"type": "text", "text": prompt})
        return cls(bundle=Path(bundle), messages=({"role": "user", "content": parts},), **others)

    @property
    def image_count(self) -> int:
        """Pictures in all messages."""
        contents = [message.get("content") for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return sum(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in parts)

    @property
    def options(self) -> SessionOptions:
        """Of the engine's sessions; no phone has what the compiled kernels need."""
        return SessionOptions("cpu", self.threads, self.weights, self.prefill, self.prepare, kernels=False)

    def to_json(self) -> str:
        """As JSON, names as here."""
        document = dataclasses.asdict(self)
        document |= {"bundle": str(self.bundle), "reference": self.reference and str(self.reference)}
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """Read what `to_json` gave.

        Raises:
            SimulationError: it is something else.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SimulationError(f"the job is no JSON ({error})") from error
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(document, dict) or set(document) != names:
            found = sorted(document) if isinstance(document, dict) else type(document).__name__
            raise SimulationError(f"the job has {found}, must have {sorted(names)}")
        for name in ("messages", "cases"):
            if not isinstance(document[name], list):
                raise SimulationError(f"{name} of a job is {document[name]!r}, must be a list")
            document[name] = tuple(document[name])
        for name in ("bundle", "reference"):
            if isinstance(document[name], str) and document[name]:
                document[name] = Path(document[name])
        return cls(**document)

    def prepare_outside(self, tell: Tell) -> list[str]:
        """Make prepared weights where the runtime would, without limits: an app ships or makes them once.

        Args:
            tell: told of a wait and of progress.

        Returns:
            Parts that were made now.

        Raises:
            BundleError: no usable bundle. DeviceError: there is no room for them. RequestError: bad options.
        """
        bundle = Bundle.open(self.bundle)
        options = dataclasses.replace(self.options, prepare=True)
        if not plan_model(bundle, options).prepare:
            return []
        made = []
        for part in PREPARED_PARTS:
            if part in bundle.manifest.parts and not prepared_state(bundle, part).ready:
                prepare(bundle, part, options, tell)
                made.append(part)
        return made

    def files(self) -> tuple[Path, ...]:
        """Folders whose files the child will map: the bundle, and prepared weights of its parts."""
        bundle = Bundle.open(self.bundle)
        states = [prepared_state(bundle, part) for part in PREPARED_PARTS if part in bundle.manifest.parts]
        return (bundle.path, *(state.graph.parent for state in states if state.ready))


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_CHECKS: dict[str, Check] = {
    "bundle": (lambda value: isinstance(value, Path), "the path of a folder"),
    "messages": (
        lambda value: (
            isinstance(value, tuple) and value != () and all(isinstance(item, Mapping) for item in value)
        ),
        "a tuple of messages",
    ),
    "context": (_or_none(_whole(1)), "a number of tokens, or None"),
    "max_tokens": (_whole(1), "an integer of at least 1"),
    "max_image_tokens": (_or_none(_whole(1)), "an integer of at least 1, or None"),
    "image_layout": (lambda value: value in IMAGE_LAYOUTS, f"one of {', '.join(IMAGE_LAYOUTS)}"),
    "threads": (_whole(0), "an integer of at least 0"),
    "weights": (lambda value: value in get_args(Weights), f"one of {', '.join(get_args(Weights))}"),
    "prefill": (lambda value: value in get_args(Prefill), f"one of {', '.join(get_args(Prefill))}"),
    "prepare": (lambda value: isinstance(value, bool), "True or False"),
    "reference": (_or_none(lambda value: isinstance(value, Path)), "the path of a file, or None"),
    "cases": (
        lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
        "a tuple of names",
    ),
    "temperature": (
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 100,
        "a number from 0",
    ),
    "seed": (_or_none(_whole(0)), "an integer of at least 0, or None"),
}
