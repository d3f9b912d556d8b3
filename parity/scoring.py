"""An engine's logits at the places of a recorded case, reached the way an answer reaches them.

In: an engine and a case. Out: `Rows` at the case's places and tokens. Knows nothing of limits and reports.

A prompt is prefilled as `chat` prefills it, up to its last token; that token and those of the recorded answer
go through the decoder. Where the bundle reads prompts with another graph than the decoder, places inside the
prompt need a run of their own: in a single one, the tokens behind the first of them would take the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.runtime.engine import Engine

from .case import Case
from .rows import Rows, reduce_logits


def score_case(
    engine: Engine, case: Case, pictures: Sequence[Image.Image], wanted: NDArray[np.bool_] | None = None
) -> Rows:
    """Score a case's sequence.

    Args:
        engine: of the bundle.
        case: of the reference.
        pictures: the case's, decoded.
        wanted: (n,) which of the case's places; default all.

    Returns:
        One row for each wanted place, in their order.

    Raises:
        RequestError: the engine cannot take the sequence. ContextLengthError: it does not fit.
    """
    chosen = np.ones(len(case.places), np.bool_) if wanted is None else wanted
    inside, answer = chosen & ~case.in_answer, chosen & case.in_answer
    apart = engine.plan.prefill != "decoder" and inside.any() and answer.any()
    runs = [inside, answer] if apart else [chosen]
    return Rows.join([part for run in runs for part in _run(engine, case, pictures, run)])


def _run(
    engine: Engine, case: Case, pictures: Sequence[Image.Image], wanted: NDArray[np.bool_]
) -> list[Rows]:
    """Score some places in one run, from the first of them to the last."""
    places, tokens, sequence = case.places[wanted], case.rows.top_ids[wanted], case.sequence
    start, stop = int(places[0]), int(places[-1]) + 1
    parts = []
    for logits in engine.score_chunks(sequence[:stop], pictures, start=start):
        low, high = np.searchsorted(places, [start, start + len(logits)])
        if high > low:
            here = places[low:high]
            parts.append(
                reduce_logits(
                    logits[here - start],
                    sequence[here + 1],
                    ids=tokens[low:high],
                    keep_all=case.rows.logits is not None,
                )
            )
        start += len(logits)
    return parts
