"""What is to be answered, and how.

In: a prompt and options. Out: a value that a batch takes, with nothing left in it that could be wrong. Knows
nothing of graphs and slots.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoglm_edge.errors import ContextLengthError, RequestError
from autoglm_edge.runtime.answer import Clock
from autoglm_edge.runtime.checks import check_max_tokens
from autoglm_edge.runtime.generation import Cancel
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.sampling import Sampler, SamplingParams
from autoglm_edge.runtime.stops import StopText, read_stops

GUARD_STOPS = ("</answer>",)
"""Never part of an answer: agents parse what stands before it, and a trailing one breaks their parser. An
answer that is held to JSON may spell it out in a string; it ends by itself."""


@dataclass(frozen=True, eq=False)
class Job:
    """One answer that is asked for; everything in it was checked.

    Attributes:
        prompt: leaves room for the budget in the context.
        sampler: of this answer alone.
        stops: strings that end it.
        budget: tokens at most.
        cancel: ends it within one run of a graph.
        clock: began when it was asked for.
    """

    prompt: Prompt
    sampler: Sampler
    stops: StopText
    budget: int
    cancel: Cancel = field(default_factory=lambda: Cancel(None))
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def check(
        cls,
        prompt: Prompt,
        params: SamplingParams,
        *,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        cancel: threading.Event | None,
        clock: Clock | None,
        vocab: int,
        context: int,
    ) -> Job:
        """What `Engine.answer` is asked for.

        Args:
            prompt: see there, as are the next ones.
            params: how tokens are chosen.
            max_tokens: answer tokens at most; None is what the context has left.
            stop: strings that end the answer and are not part of it.
            cancel: ends it.
            clock: started when the request came; None is now.
            vocab: ids that the tokenizer knows.
            context: tokens that prompt and answer may have together.

        Raises:
            RequestError: an option is wrong.
            ContextLengthError: prompt and answer do not fit.
        """
        check_max_tokens(max_tokens)
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise RequestError(f"cancel is {cancel!r}, must be an event such as threading.Event()")
        if len(prompt.ids) + (max_tokens or 1) > context:
            raise ContextLengthError(len(prompt.ids), max_tokens or 1, context)
        return cls(
            prompt,
            Sampler(params, vocab=vocab, prompt_ids=prompt.ids),
            StopText((*(() if params.grammar else GUARD_STOPS), *read_stops(stop))),
            max_tokens or context - len(prompt.ids),
            Cancel(cancel),
            clock or Clock(),
        )
