"""Scored positions of a sequence, cut down to what a comparison needs.

In: logits (n, V), of any model. Out: `Rows`: of each position the likeliest tokens with their logits, the
log-sum-exp of all and of the rest, and the logit of the token that comes next; and `compare`, two of these
row by row. Knows nothing of models, prompts and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Floats, kl_divergence, kl_from_top, log_sum_exp


@dataclass(frozen=True, eq=False)
class Rows:
    """n positions of one sequence.

    Attributes:
        top_ids: (n, k) int64, k distinct tokens of each row; those of the reference, for a candidate too.
        top_logits: (n, k) float32.
        lse: (n,) float64, log-sum-exp of all V logits.
        tail: (n,) float64, log-sum-exp of the V - k logits that are not in top_logits; -inf if k = V. Summed
            on its own, since 1 minus the others would leave nothing but rounding.
        next_logits: (n,) float32, of the token that comes next in the sequence.
        best: (n,) int64, the likeliest token; the lowest id among equals.
        logits: (n, V) float32 if all of them were kept, else None.
    """

    top_ids: NDArray[np.int64]
    top_logits: NDArray[np.float32]
    lse: Floats
    tail: Floats
    next_logits: NDArray[np.float32]
    best: NDArray[np.int64]
    logits: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.lse)

    @property
    def next_nll(self) -> Floats:
        """(n,) negative log likelihood of the next token."""
        return self.lse - self.next_logits.astype(np.float64)

    @property
    def tail_mass(self) -> Floats:
        """(n,) probability of all tokens that are not in top_ids."""
        result: Floats = np.exp(self.tail - self.lse)
        return result

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Rows one after the other; at least one part."""
        columns: dict[str, Any] = {}
        for item in fields(cls):
            values = [getattr(part, item.name) for part in parts]
            columns[item.name] = None if any(value is None for value in values) else np.concatenate(values)
        return cls(**columns)

    def part(self, chosen: NDArray[np.bool_]) -> Rows:
        """The rows where `chosen` (n,) is true."""
        columns: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            columns[item.name] = None if value is None else value[chosen]
        return Rows(**columns)


def reduce_logits(
    logits: NDArray[np.float32],
    next_ids: NDArray[np.int64],
    *,
    top_k: int | None = None,
    ids: NDArray[np.int64] | None = None,
    keep_all: bool = False,
) -> Rows:
    """Cut (n, V) logits down.

    Args:
        logits: (n, V).
        next_ids: (n,) the token that comes next.
        top_k: how many of the likeliest to take, likeliest first; V if larger.
        ids: (n, k) tokens to take instead, those of a reference.
        keep_all: keep the logits, too.
    """
    count, vocab = logits.shape
    if ids is None:
        wanted = min(top_k or vocab, vocab)
        if wanted < vocab:
            ids = np.argpartition(logits, vocab - wanted, axis=1)[:, vocab - wanted :]
        else:
            ids = np.tile(np.arange(vocab), (count, 1))
        order = np.argsort(-np.take_along_axis(logits, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
    rest = logits.astype(np.float64)
    lse = log_sum_exp(rest)
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    return Rows(
        ids.astype(np.int64),
        np.take_along_axis(logits, ids, axis=1),
        lse,
        log_sum_exp(rest),
        logits[np.arange(count), next_ids],
        logits.argmax(axis=1).astype(np.int64),
        logits if keep_all else None,
    )


@dataclass(frozen=True, eq=False)
class Differences:
    """Two scorings of the same positions, row by row.

    Attributes:
        kl: (n,) float64, KL(reference || candidate) in nats; a lower bound where tail_mass is not 0.
        tail_mass: (n,) float64, probability that the reference gives to tokens taken as one; 0 if exact.
        same_best: (n,) bool, the likeliest token is the same.
        reference_nll: (n,) float64, of the next token.
        candidate_nll: (n,) float64, of the next token.
    """

    kl: Floats
    tail_mass: Floats
    same_best: NDArray[np.bool_]
    reference_nll: Floats
    candidate_nll: Floats

    @property
    def delta_p(self) -> Floats:
        """(n,) probability of the next token: candidate minus reference."""
        result: Floats = np.exp(-self.candidate_nll) - np.exp(-self.reference_nll)
        return result

    @classmethod
    def join(cls, parts: Sequence[Differences]) -> Differences:
        """One after the other; at least one part."""
        return cls(
            **{
                item.name: np.concatenate([getattr(part, item.name) for part in parts])
                for item in fields(cls)
            }
        )

    def part(self, chosen: NDArray[np.bool_]) -> Differences:
        """The rows where `chosen` (n,) is true."""
        return Differences(**{item.name: getattr(self, item.name)[chosen] for item in fields(self)})


def compare(reference: Rows, candidate: Rows) -> Differences:
    """Compare two scorings of the same positions, at the same tokens.

    The divergence is exact if both kept all logits; see `kl_from_top` for what it is otherwise. A best token
    counts as the same where the reference itself gives both candidates the same logit: bfloat16 logits are
    full of such ties, and the choice among them says nothing.
    """
    assert np.array_equal(reference.top_ids, candidate.top_ids), "both are cut at the reference's tokens"
    if reference.logits is not None and candidate.logits is not None:
        kl, tail = kl_divergence(reference.logits, candidate.logits), np.zeros(len(reference))
    else:
        kl = kl_from_top(
            reference.top_logits - reference.lse[:, None],
            reference.tail - reference.lse,
            candidate.top_logits - candidate.lse[:, None],
            candidate.tail - candidate.lse,
        )
        tail = reference.tail_mass
    highest = reference.top_logits.max(axis=1)
    tied = (reference.top_ids == candidate.best[:, None]) & (reference.top_logits == highest[:, None])
    same = (reference.best == candidate.best) | tied.any(axis=1)
    return Differences(kl, tail, same, reference.next_nll, candidate.next_nll)
