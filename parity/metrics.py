"""Measures of how far one distribution over tokens, or one answer, is from another.

In: numpy arrays and token ids. Out: numbers. Pure functions; they know no model, file or engine.

Letters: n rows (scored positions), k recorded tokens of a row, V vocabulary. The reference is P, the
candidate Q. Definitions follow llama.cpp's `perplexity` tool (tools/perplexity/README.md) where it has one,
so that figures can be laid side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WILSON_Z = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


def log_sum_exp(values: NDArray[np.floating]) -> Floats:
    """log(sum(exp(values))) over the last axis in float64; -inf for an empty axis or nothing but -inf."""
    if values.shape[-1] == 0:
        return np.full(values.shape[:-1], -np.inf)
    wide = values.astype(np.float64)
    highest = wide.max(axis=-1, keepdims=True)
    shift = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        result: Floats = np.log(np.exp(wide - shift).sum(axis=-1)) + shift[..., 0]
    return result


def kl_divergence(p_logits: NDArray[np.floating], q_logits: NDArray[np.floating]) -> Floats:
    """KL(P || Q) = sum p (log p - log q) of every row, in nats, exact.

    Args:
        p_logits: (n, V) of the reference.
        q_logits: (n, V) of the candidate.

    Returns:
        (n,) float64, never below 0.
    """
    log_p = p_logits.astype(np.float64) - log_sum_exp(p_logits)[:, None]
    log_q = q_logits.astype(np.float64) - log_sum_exp(q_logits)[:, None]
    result: Floats = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    return result


def kl_from_top(log_p: Floats, log_p_tail: Floats, log_q: Floats, log_q_tail: Floats) -> Floats:
    """KL(P || Q) of rows of which only the k likeliest tokens of P are known one by one.

    All other tokens together are taken as one outcome, the tail:
    sum over the k of p (log p - log q), plus p_tail (log p_tail - log q_tail). By the log sum inequality
    (Cover and Thomas, Elements of Information Theory, theorem 2.7.1) this is a lower bound of the divergence
    over the whole vocabulary; what is missing is p_tail times the divergence within the tail. So it is exact
    for k = V, and as good as exact where the tail of P is small.

    Args:
        log_p: (n, k) log probabilities of P; rows may be padded with -inf.
        log_p_tail: (n,) log of the probability that P gives to all other tokens; -inf if there are none.
        log_q: (n, k) of Q, at the same tokens.
        log_q_tail: (n,) of Q.

    Returns:
        (n,) float64, never below 0.
    """
    with np.errstate(invalid="ignore"):
        head = np.exp(log_p) * (log_p - log_q)
        tail = np.exp(log_p_tail) * (log_p_tail - log_q_tail)
    # 0 log 0 = 0; a token that P never gives costs nothing, whatever Q does.
    head = np.where(np.isneginf(log_p), 0.0, head)
    tail = np.where(np.isneginf(log_p_tail), 0.0, tail)
    result: Floats = np.maximum(0.0, head.sum(axis=1) + tail)
    return result


@dataclass(frozen=True)
class Spread:
    """A distribution of per-row values in five numbers.

    Attributes:
        count: rows.
        mean: their mean; nan without rows, as all that follow.
        median: 50th percentile.
        p90: 90th percentile, linear between neighbours (numpy's default).
        p99: 99th percentile.
        highest: the largest.
    """

    count: int
    mean: float
    median: float
    p90: float
    p99: float
    highest: float

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Spread:
        """The numbers of (n,) values."""
        if values.size == 0:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        median, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(
            int(values.size),
            float(values.mean()),
            float(median),
            float(p90),
            float(p99),
            float(values.max()),
        )


@dataclass(frozen=True)
class Share:
    """Successes among trials, with the Wilson interval.

    Attributes:
        hits: successes.
        total: trials.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The quotient; nan without trials."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % score interval (E. B. Wilson, JASA 22, 1927); (0, 1) without trials.

        Unlike p ± 1.96 s it has width at 0 and 100 %, where such shares live.
        """
        if self.total == 0:
            return 0.0, 1.0
        p, n, z2 = self.value, self.total, WILSON_Z**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = WILSON_Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity of both on the same text.

    Attributes:
        reference: exp of the mean negative log likelihood under P.
        candidate: the same under Q.
        change: candidate - reference.
        standard_error: of the change.
    """

    reference: float
    candidate: float
    change: float
    standard_error: float


def perplexity_change(p_nll: Floats, q_nll: Floats) -> PerplexityChange:
    """Perplexities and their difference with its standard error.

    The error follows from first-order propagation with the covariance of the two, as both see the same
    tokens (llama.cpp, tools/perplexity/README.md): variance = Q² var(q) + P² var(p) - 2 P Q cov(p, q), with
    the variances of the mean nll. Rows are taken as independent.

    Args:
        p_nll: (n,) -log p of the tokens that come next.
        q_nll: (n,) -log q of the same.
    """
    n = p_nll.size
    if n == 0:
        return PerplexityChange(math.nan, math.nan, math.nan, math.nan)
    p, q = float(np.exp(p_nll.mean())), float(np.exp(q_nll.mean()))
    if n == 1:
        return PerplexityChange(p, q, q - p, math.nan)
    cov = np.cov(np.stack([p_nll, q_nll])) / n
    variance = p * p * cov[0, 0] + q * q * cov[1, 1] - 2 * p * q * cov[0, 1]
    return PerplexityChange(p, q, q - p, math.sqrt(max(0.0, float(variance))))


def rms(values: NDArray[np.floating]) -> float:
    """Root of the mean square; of Δp (probabilities of the token that comes next) this is llama.cpp's RMS Δp.

    Returns:
        nan without values.
    """
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2))) if values.size else math.nan


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common prefix of two id lists."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def cosine(first: NDArray[np.floating], second: NDArray[np.floating]) -> Floats:
    """Cosine of the angle between rows: a·b / (|a| |b|).

    Args:
        first: (N, C).
        second: (N, C).

    Returns:
        (N,) float64; 1 where both rows are zero, 0 where only one is.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = lengths[0] * lengths[1]
    both = (lengths[0] == 0) & (lengths[1] == 0)
    result: Floats = np.where(
        product > 0, (a * b).sum(axis=1) / np.where(product > 0, product, 1.0), both.astype(float)
    )
    return result


def point_distance(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Euclidean distance of two points in their own unit."""
    return math.hypot(first[0] - second[0], first[1] - second[1])
