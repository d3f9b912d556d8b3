"""Sampling: the logits of one position in, one token id out.

In: `SamplingParams` of a request and (V,) logits, one row per answer token. Out: token ids. A `Sampler`
lives for one answer: it counts what it has drawn for the penalties and owns the random stream. It knows
nothing of text, stop strings or end-of-answer ids.

Order, as in transformers and vLLM: logit_bias, repetition penalty, frequency and presence penalty, grammar,
temperature, top_k, top_p, min_p, draw. Bias and penalties act at temperature 0 too. What a grammar forbids
takes no part in what follows it. Equal logits: the lowest id wins. Only a handful of ids is ever sorted; the
whole row (V = 151,552 in a 9B checkpoint) is at most partitioned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, RequestError

from .grammar import Grammar

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

MAX_BIAS = 100.0
"""Largest logit bias, either sign (the OpenAI API's limit)."""

_FIRST_CANDIDATES = 256
"""Ids that top_p looks at before it widens its search; agent answers need far fewer."""

_LEAST_TEMPERATURE = 1e-30
"""A temperature below this would be 0 in float32; the draw is the likeliest token long before."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; every value is checked on construction.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token. 0 to 2.
        top_p: keep the likeliest tokens that together reach this probability. 0 to 1; 1 is off.
        top_k: keep so many of the likeliest tokens (all that tie with the last). 0 (or -1) is off.
        min_p: keep tokens at least this fraction as likely as the likeliest. 0 to 1; 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of every id in prompt or answer
            (Keskar et al. 2019, arXiv 1909.05858, as transformers does it). Above 0 up to 10; 1 is off.
        frequency_penalty: subtracted once per occurrence in the answer (OpenAI's formula). -2 to 2.
        presence_penalty: subtracted once if the id is in the answer at all (OpenAI's formula). -2 to 2.
        logit_bias: id to value added, -100 to 100; decimal strings are taken as ids, as JSON has them. Kept
            as a tuple of pairs, ascending.
        seed: of the random stream, any 64-bit integer; None draws a new one.
        grammar: what the answer is held to, as from `Engine.grammar`; None leaves it free.

    Raises:
        RequestError: a value has the wrong type or lies outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 2.0)
        _check_real("top_p", self.top_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, -1, None)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_below=True)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**64 - 1)
        if not (self.grammar is None or isinstance(self.grammar, Grammar)):
            raise RequestError(
                f"grammar is of type {type(self.grammar).__name__}, must be one made by Engine.grammar"
            )
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from names and values as a request or a checkpoint gives them; None means the default.

        A grammar is no such value: it belongs to an engine.

        Raises:
            RequestError: an unknown name, or a value as in the constructor.
        """
        known = {item.name for item in fields(cls)} - {"grammar"}
        if unknown := sorted(set(values) - known):
            raise RequestError(
                f"{unknown[0]!r} is not a sampling parameter; known are {', '.join(sorted(known))}"
            )
        return cls(**{name: value for name, value in values.items() if value is not None})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken and no random number is drawn."""
        return self.temperature == 0


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(
        self, params: SamplingParams, *, vocab: int, prompt_ids: NDArray[np.integer[Any]] | None = None
    ) -> None:
        """Start an answer.

        Args:
            params: how to choose.
            vocab: ids that the tokenizer knows; logits past it are padding and never chosen.
            prompt_ids: (T,) ids that the repetition penalty counts as seen; ids past vocab are ignored.

        Raises:
            RequestError: logit_bias names an id that the tokenizer does not know, or the grammar is one of
                another tokenizer.
        """
        self.params = params
        self.vocab = vocab
        bias = params.logit_bias
        assert isinstance(bias, tuple)
        for token, _ in bias:
            if token >= vocab:
                raise RequestError(f"logit_bias names the token id {token}, must be 0 to {vocab - 1}")
        self._bias_ids = np.array([token for token, _ in bias], dtype=np.int64)
        self._bias = np.array([value for _, value in bias], dtype=np.float32)
        self._answer_tokens = 0
        self._counts = _Counts(vocab)
        self._seen = _Counts(vocab)
        if params.repetition_penalty != 1 and prompt_ids is not None:
            self._seen.add_many(np.asarray(prompt_ids, dtype=np.int64).ravel())
        seed = None if params.seed is None else int(params.seed) % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))
        if params.grammar is not None and params.grammar.vocab != vocab:
            raise RequestError(
                f"the grammar was made for a tokenizer of {params.grammar.vocab} ids, this one has {vocab}; "
                "make it with the engine that answers"
            )
        self._matcher = None if params.grammar is None else params.grammar.begin(prompt_ids)

    def sample(self, logits: NDArray[np.floating[Any]]) -> int:
        """Choose the next token of the answer and count it.

        Args:
            logits: (V,) of the last position, V at least `vocab`; not modified.

        Raises:
            BundleError: the logits hold NaN or +inf, or nothing but -inf.
            RequestError: the grammar allows nothing more, or is too complex to go on with.
        """
        scores, best = self._held(self._scores(logits))
        if self.params.is_greedy:
            token = best
        else:
            ids, weights = self._candidates(scores, scores[best])
            token = int(ids[self._draw(weights)])
        if self._matcher is not None:
            token = self._matcher.push(token)
        self._count(token)
        return token

    def distribution(self, logits: NDArray[np.floating[Any]]) -> tuple[Int64, NDArray[np.float64]]:
        """What `sample` would draw from, without drawing or counting.

        Args:
            logits: as in `sample`.

        Returns:
            ids (n,), likeliest first, and their probabilities (n,), which sum to 1.

        Raises:
            BundleError: as in `sample`.
            RequestError: as in `sample`.
        """
        scores, best = self._held(self._scores(logits))
        if self.params.is_greedy:
            return np.array([best], dtype=np.int64), np.ones(1)
        ids, weights = self._candidates(scores, scores[best])
        order = np.argsort(-weights, kind="stable")
        return ids[order], weights[order] / weights.sum(dtype=np.float64)

    def _scores(self, logits: NDArray[np.floating[Any]]) -> Float32:
        """Logits of the known ids with bias and penalties, (vocab,); a copy only if something changes."""
        if logits.ndim != 1 or logits.size < self.vocab:
            raise BundleError(
                f"the decoder gave logits of shape {logits.shape} for a tokenizer of {self.vocab} ids; "
                "decoder and tokenizer are not of one checkpoint, export it again"
            )
        params = self.params
        repetition = params.repetition_penalty != 1 and self._seen.ids.size > 0
        counting = self._counts.ids.size > 0
        changed = self._bias_ids.size > 0 or repetition or counting
        scores: Float32 = logits[: self.vocab].astype(np.float32, copy=changed)
        if self._bias_ids.size:
            scores[self._bias_ids] += self._bias
        if repetition:
            ids, penalty = self._seen.ids, np.float32(params.repetition_penalty)
            chosen = scores[ids]
            scores[ids] = np.where(chosen < 0, chosen * penalty, chosen / penalty)
        if counting:
            ids = self._counts.ids
            scores[ids] -= self._counts.of(ids) * np.float32(params.frequency_penalty) + np.float32(
                params.presence_penalty
            )
        return scores

    def _held(self, scores: Float32) -> tuple[Float32, int]:
        """Scores with -inf where the grammar forbids an id, and the likeliest id that is left."""
        best = self._likeliest(scores)
        if self._matcher is None or (self.params.is_greedy and self._matcher.takes(best)):
            return scores, best
        allowed = self._matcher.allowed()
        if allowed is None:
            return scores, best
        scores = np.where(allowed, scores, np.float32(-np.inf))
        best = int(scores.argmax())
        if scores[best] == -np.inf:
            raise RequestError(
                f"the model rules out all that the grammar allows at answer token {self._answer_tokens + 1}; "
                "ask without a grammar, or for other JSON"
            )
        return scores, best

    def _likeliest(self, scores: Float32) -> int:
        """The lowest id with the highest score; argmax stops at a NaN, so this finds those as well."""
        best = int(scores.argmax())
        peak = scores[best]
        if np.isfinite(peak):
            return best
        what = (
            "only -inf" if peak == -np.inf else f"{'NaN' if np.isnan(peak) else '+inf'} for token id {best}"
        )
        raise BundleError(
            f"the decoder gave {what} at answer token {self._answer_tokens + 1}; the weights are damaged or "
            "activations overflow, check with `autoglm info --verify` or export with --activations float32"
        )

    def _candidates(self, scores: Float32, peak: np.float32) -> tuple[Int64, Float32]:
        """Ids that may be drawn, ascending or by falling weight, and weights; the likeliest weighs 1."""
        params = self.params
        ids: Int64 | None = None
        if self._matcher is not None:
            # A partition of 150,000 equal values takes fifteen times that of different ones.
            ids = np.flatnonzero(scores > -np.inf)
            scores = scores[ids]
        if 0 < params.top_k < scores.size:
            kept = _at_least_kth(scores, params.top_k)
            scores = scores[kept]
            ids = kept if ids is None else ids[kept]
        weights = _weights(scores, peak, float(params.temperature))
        if params.top_p < 1:
            kept = _nucleus(weights, float(params.top_p))
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p)
            weights = weights[kept]
            ids = kept if ids is None else ids[kept]
        return np.arange(self.vocab) if ids is None else ids, weights

    def _draw(self, weights: Float32) -> int:
        """Index drawn in proportion to the weights; one random number per token."""
        ends = np.cumsum(weights, dtype=np.float64)
        index = int(np.searchsorted(ends, self._random.random() * ends[-1], side="right"))
        # Rounding may land on the very end: step back to the last index that has a weight.
        return min(index, int(np.searchsorted(ends, ends[-1], side="left")))

    def _count(self, token: int) -> None:
        self._answer_tokens += 1
        if self.params.frequency_penalty != 0 or self.params.presence_penalty != 0:
            self._counts.add(token)
        if self.params.repetition_penalty != 1:
            self._seen.add(token)


class _Counts:
    """How often ids have occurred; memory for the whole vocabulary only once something was counted."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._counts: Float32 | None = None
        self._ids: list[int] = []
        self._array: Int64 = np.empty(0, dtype=np.int64)

    @property
    def ids(self) -> Int64:
        """Ids that occurred, each once."""
        if self._array.size != len(self._ids):
            self._array = np.array(self._ids, dtype=np.int64)
        return self._array

    def of(self, ids: Int64) -> Float32:
        """Occurrences of the ids."""
        assert self._counts is not None
        return self._counts[ids]

    def add(self, token: int) -> None:
        if self._counts is None:
            self._counts = np.zeros(self._vocab, dtype=np.float32)
        if self._counts[token] == 0:
            self._ids.append(token)
        self._counts[token] += 1

    def add_many(self, tokens: Int64) -> None:
        for token in np.unique(tokens):
            if 0 <= token < self._vocab:
                self.add(int(token))


def _weights(scores: Float32, peak: np.float32, temperature: float) -> Float32:
    """exp((score - peak) / temperature): nothing overflows, and the peak weighs 1."""
    divisor = np.float32(max(temperature, _LEAST_TEMPERATURE))
    with np.errstate(over="ignore", under="ignore"):
        exponents: Float32 = scores - peak
        exponents /= divisor
        return np.exp(exponents, out=exponents)


def _at_least_kth(scores: Float32, count: int) -> Int64:
    """Ids of the `count` highest scores and of all that tie with the last of them, ascending; never -inf."""
    kth = np.partition(scores, scores.size - count)[scores.size - count]
    return np.flatnonzero(scores >= kth if kth > -np.inf else scores > -np.inf)


def _nucleus(weights: Float32, top_p: float) -> Int64:
    """Indices of the likeliest tokens up to the one that reaches top_p of all weight, likeliest first."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    count = _FIRST_CANDIDATES
    while count < weights.size:
        kth = np.partition(weights, weights.size - count)[weights.size - count]
        likely = np.flatnonzero(weights >= kth)
        if float(weights[likely].sum(dtype=np.float64)) >= goal:
            break
        count *= 16
    else:
        likely = np.arange(weights.size)
    order = likely[np.argsort(-weights[likely], kind="stable")]
    # Kept: every token before which the goal was not yet reached, hence always the first.
    before = np.cumsum(weights[order], dtype=np.float64) - weights[order]
    kept = int(np.count_nonzero(before < goal))
    return order[: max(kept, 1)]


def _check_real(name: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if (low < number if open_below else low <= number) and number <= high:  # never true of NaN
            return
    raise RequestError(
        f"{name} is {value!r}, must be a number {'above' if open_below else 'from'} {low:g} to {high:g}"
    )


def _check_integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return
    bound = f"from {low} to {high}" if high is not None else f"of {low} or more"
    raise RequestError(f"{name} is {value!r}, must be an integer {bound}")


def _read_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """Pairs (id, value), ascending by id."""
    if isinstance(bias, Mapping):
        pairs = list(bias.items())
    elif (
        isinstance(bias, Sequence)
        and not isinstance(bias, str)
        and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in bias)
    ):
        pairs = [(pair[0], pair[1]) for pair in bias]
    else:
        raise RequestError(f"logit_bias is {bias!r}, must map token ids to numbers from -100 to 100")
    read: dict[int, float] = {}
    for key, value in pairs:
        token = (
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        )
        _check_integer("a token id of logit_bias", token, 0, 2**31 - 1)
        _check_real(f"logit_bias of token {token}", value, -MAX_BIAS, MAX_BIAS)
        if int(token) in read:
            raise RequestError(f"logit_bias names the token id {token} twice")
        read[int(token)] = float(value)
    return tuple(sorted(read.items()))
