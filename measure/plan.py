"""What a bench measures: lengths, contexts, picture sizes, repetitions; and what of it a bundle can do.

In: numbers. Out: a checked `BenchPlan`. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoglm_edge.errors import RequestError
from autoglm_edge.runtime.checks import MOST_ANSWERS
from autoglm_edge.runtime.manifest import Manifest

MOST_TOKENS = 1 << 20
TOGETHER_AT = 1024
"""Tokens that each of several answers has behind it."""


@dataclass(frozen=True)
class BenchPlan:
    """Sizes and repetitions.

    Attributes:
        prefill: lengths of prompts in tokens.
        decode_at: tokens in the cache before the first step.
        images: most tokens of a picture, as `max_image_tokens`.
        together: answers that are decoded in one run, each after TOGETHER_AT tokens.
        steps: tokens that a repetition of decode takes.
        repeat: repetitions of everything.
    """

    prefill: tuple[int, ...] = (128, 512, 1500)
    decode_at: tuple[int, ...] = (0, 1024, 4096)
    images: tuple[int, ...] = (256, 592, 1196)
    together: tuple[int, ...] = (2, 4, 8)
    steps: int = 16
    repeat: int = 3

    def __post_init__(self) -> None:
        for name, least in (("prefill", 1), ("decode_at", 0), ("images", 1), ("together", 2)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(_whole(value, least) for value in values):
                raise RequestError(f"{name} is {values!r}, must be integers from {least} to {MOST_TOKENS}")
            if len(set(values)) != len(values):
                raise RequestError(f"{name} is {values!r}, must name each size once")
        for name in ("steps", "repeat"):
            if not _whole(getattr(self, name), 1):
                raise RequestError(f"{name} is {getattr(self, name)!r}, must be an integer from 1")
        if max(self.together, default=0) > MOST_ANSWERS:
            raise RequestError(
                f"together is {self.together!r}, at most {MOST_ANSWERS} answers are decoded so"
            )
        if not (self.prefill or self.decode_at or self.images or self.together):
            raise RequestError("there is nothing to measure; name a length, a context or a picture size")

    @classmethod
    def quick(cls) -> BenchPlan:
        """The smallest of everything, once."""
        return cls(prefill=(128,), decode_at=(0,), images=(256,), together=(2,), steps=8, repeat=1)

    @property
    def longest(self) -> int:
        """Tokens that the cache must hold."""
        return max([*self.prefill, *(start + self.steps for start in self.decode_at), 1])

    def misfits(self, manifest: Manifest) -> list[str]:
        """Why a bundle cannot do all of it: one sentence per size that is too large."""
        context, most = manifest.geometry.context_length, manifest.image.max_tokens
        found = [
            f"prefill of {size} tokens: the model has positions for {context}"
            for size in self.prefill
            if size > context
        ]
        found += [
            f"decode at {size} tokens and {self.steps} more: the model has positions for {context}"
            for size in self.decode_at
            if size + self.steps > context
        ]
        if self.together and TOGETHER_AT + self.steps > context:
            found.append(
                f"answers together at {TOGETHER_AT} tokens and {self.steps} more: "
                f"the model has positions for {context}"
            )
        found += [
            f"pictures of {size} tokens: the bundle allows {most}" for size in self.images if size > most
        ]
        return found

    def fitting(self, manifest: Manifest) -> BenchPlan:
        """The part that a bundle can do; at least one size of each kind that was asked for.

        Raises:
            RequestError: the model has too few positions for one step.
        """
        context, most = manifest.geometry.context_length, manifest.image.max_tokens
        if self.decode_at and self.steps > context:
            raise RequestError(f"steps is {self.steps}, but the model has positions for {context} tokens")
        return replace(
            self,
            prefill=_up_to(self.prefill, context),
            decode_at=_up_to(self.decode_at, context - self.steps),
            images=_up_to(self.images, most),
            together=self.together if TOGETHER_AT + self.steps <= context else (),
        )


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    kept = tuple(size for size in sizes if size <= limit)
    return kept or ((limit,) if sizes else ())


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_TOKENS
