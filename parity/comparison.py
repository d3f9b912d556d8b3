"""Everything that is known of one candidate: case by case in, figures out.

In: cases of a reference, and what a candidate (a bundle, or another reference) made of each. Out: a
`Comparison`. Knows nothing of engines and files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .case import Case
from .metrics import PerplexityChange, Share, Spread, common_prefix, cosine, perplexity_change, rms
from .rows import Differences, Rows, compare
from .taps import ActionFigures, ActionOutcome, compare_actions

WORST = 12
"""Positions shown."""
CONTEXT_TOKENS = 24
"""Tokens shown before a position."""
CURVE = (50, 75, 90, 95, 98, 99, 99.5, 99.9, 100)
"""Percentiles of the divergence that are kept for plots."""

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, eq=False)
class Observed:
    """What a candidate made of one case.

    Attributes:
        rows: scores at the case's places and tokens.
        greedy: ids of its own answer, without the end token.
        features: per image (f, C), the rows that the case kept.
    """

    rows: Rows
    greedy: tuple[int, ...]
    features: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class Figures:
    """Over a set of positions.

    Attributes:
        kl: divergence in nats.
        kl_error: standard error of its mean, positions taken as independent.
        tail_mass: mean probability that the reference gives to tokens taken as one; 0 if exact.
        top1: positions with the same likeliest token.
        perplexity: of the text, and its change.
        rms_delta_p: root mean square change of the next token's probability.
        curve: divergence at the percentiles of CURVE.
    """

    kl: Spread
    kl_error: float
    tail_mass: float
    top1: Share
    perplexity: PerplexityChange
    rms_delta_p: float
    curve: tuple[float, ...]

    @classmethod
    def of(cls, rows: Differences) -> Figures:
        """Sum up positions."""
        count = len(rows.kl)
        return cls(
            Spread.of(rows.kl),
            float(rows.kl.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan,
            float(rows.tail_mass.mean()) if count else math.nan,
            Share(int(rows.same_best.sum()), count),
            perplexity_change(rows.reference_nll, rows.candidate_nll),
            rms(rows.delta_p),
            tuple(float(value) for value in np.percentile(rows.kl, CURVE)) if count else (),
        )


@dataclass(frozen=True)
class GreedyOutcome:
    """Two greedy answers to one prompt.

    Attributes:
        case: name of the prompt.
        reference_tokens: length of the reference's answer, end token not counted.
        candidate_tokens: length of the candidate's.
        prefix: tokens until they part; both lengths if they are the same.
        margin: at the parting, logits by which the reference preferred its token to the next best: small for
            a near tie; nan if they do not part within the scored answer.
        reference_text: the reference's answer.
        candidate_text: the candidate's.
    """

    case: str
    reference_tokens: int
    candidate_tokens: int
    prefix: int
    margin: float
    reference_text: str
    candidate_text: str

    @property
    def same(self) -> bool:
        """Whether the answers are the same."""
        return self.prefix == self.reference_tokens == self.candidate_tokens


@dataclass(frozen=True)
class ImageOutcome:
    """Vision features of one image.

    Attributes:
        case: name of the prompt.
        image: number of the image in it.
        mean_cosine: over its tokens.
        least_cosine: of its worst token.
        relative_error: root mean square of the difference by that of the reference.
    """

    case: str
    image: int
    mean_cosine: float
    least_cosine: float
    relative_error: float


@dataclass(frozen=True)
class WorstPlace:
    """A position where the two are far apart.

    Attributes:
        case: name of the prompt.
        place: index in prompt and answer.
        in_answer: whether the next token is one of the answer.
        kl: divergence in nats.
        before: text that ends there.
        next_text: the token that comes next.
        reference_best: the reference's likeliest token.
        candidate_best: the candidate's.
        reference_p: probability of the next token under the reference.
        candidate_p: under the candidate.
    """

    case: str
    place: int
    in_answer: bool
    kl: float
    before: str
    next_text: str
    reference_best: str
    candidate_best: str
    reference_p: float
    candidate_p: float


@dataclass(frozen=True)
class Comparison:
    """A candidate against the reference.

    Attributes:
        title: of the candidate.
        cases: compared.
        answer: figures over positions of the answers; limits are about these.
        text: figures over all scored positions.
        groups: per group of prompts, over the answers.
        vision_cosine: mean over the images; nan without images.
        least_vision_cosine: of all tokens; nan without images.
        images: each.
        same_answers: greedy answers that are the same.
        greedy: each.
        actions: counted, and each.
        worst: positions with the largest divergence.
    """

    title: str
    cases: int
    answer: Figures
    text: Figures
    groups: dict[str, Figures]
    vision_cosine: float
    least_vision_cosine: float
    images: tuple[ImageOutcome, ...]
    same_answers: Share
    greedy: tuple[GreedyOutcome, ...]
    actions: ActionFigures
    worst: tuple[WorstPlace, ...]


@dataclass
class Collector:
    """Gathers a comparison case by case, so that one case is in memory at a time.

    Attributes:
        title: of the candidate.
        decode: ids to text, special tokens dropped.
        spell: ids to text, special tokens shown.
        eos: end tokens.
    """

    title: str
    decode: Decode
    spell: Decode
    eos: frozenset[int]
    _rows: list[Differences] = field(default_factory=list)
    _in_answer: list[NDArray[np.bool_]] = field(default_factory=list)
    _groups: list[NDArray[np.str_]] = field(default_factory=list)
    _images: list[ImageOutcome] = field(default_factory=list)
    _greedy: list[GreedyOutcome] = field(default_factory=list)
    _actions: list[ActionOutcome] = field(default_factory=list)
    _worst: list[WorstPlace] = field(default_factory=list)

    def add(self, case: Case, observed: Observed, *, size: tuple[int, int] | None) -> None:
        """Compare one case.

        Args:
            case: of the reference.
            observed: of the candidate.
            size: width and height of the case's last picture, or None.
        """
        rows = compare(case.rows, observed.rows)
        self._rows.append(rows)
        self._in_answer.append(case.in_answer)
        self._groups.append(np.full(len(case.places), case.group))
        for number, ((_, theirs), ours) in enumerate(zip(case.features, observed.features, strict=True)):
            self._images.append(_image_outcome(case.name, number, theirs, ours))
        answer = without_end(case.greedy, self.eos)
        self._greedy.append(self._greedy_outcome(case, answer, observed.greedy))
        action = compare_actions(
            case.name, self.decode(answer), self.decode(observed.greedy), size=size, box=case.box
        )
        if action is not None:
            self._actions.append(action)
        self._keep_worst(case, observed.rows, rows)

    def result(self) -> Comparison | None:
        """The figures; None if no case was compared."""
        if not self._rows:
            return None
        rows = Differences.join(self._rows)
        in_answer, groups = np.concatenate(self._in_answer), np.concatenate(self._groups)
        names = dict.fromkeys(str(group) for group in groups)
        cosines = [image.mean_cosine for image in self._images]
        return Comparison(
            self.title,
            len(self._rows),
            Figures.of(rows.part(in_answer)),
            Figures.of(rows),
            {name: Figures.of(rows.part(in_answer & (groups == name))) for name in names},
            float(np.mean(cosines)) if cosines else math.nan,
            min((image.least_cosine for image in self._images), default=math.nan),
            tuple(self._images),
            Share(sum(outcome.same for outcome in self._greedy), len(self._greedy)),
            tuple(self._greedy),
            ActionFigures.of(self._actions),
            tuple(self._worst),
        )

    def _greedy_outcome(self, case: Case, answer: tuple[int, ...], theirs: tuple[int, ...]) -> GreedyOutcome:
        prefix = common_prefix(answer, theirs)
        margin = math.nan
        first = int(np.searchsorted(case.places, len(case.ids) - 1))
        scored = np.array_equal(case.greedy, case.answer) and case.rows.top_logits.shape[1] > 1
        if not prefix == len(answer) == len(theirs) and scored and first + prefix < len(case.places):
            ordered = np.sort(case.rows.top_logits[first + prefix])
            margin = float(ordered[-1] - ordered[-2])
        return GreedyOutcome(
            case.name, len(answer), len(theirs), prefix, margin, self.decode(answer), self.decode(theirs)
        )

    def _keep_worst(self, case: Case, candidate: Rows, rows: Differences) -> None:
        sequence = case.sequence
        for index in np.argsort(-rows.kl, kind="stable")[:WORST]:
            place = int(case.places[index])
            if len(self._worst) >= WORST and rows.kl[index] <= self._worst[-1].kl:
                break
            before = self.spell(_without_runs(sequence[: place + 1])[-CONTEXT_TOKENS:])
            self._worst.append(
                WorstPlace(
                    case.name,
                    place,
                    bool(case.in_answer[index]),
                    float(rows.kl[index]),
                    before,
                    self.spell([int(sequence[place + 1])]),
                    self.spell([int(case.rows.best[index])]),
                    self.spell([int(candidate.best[index])]),
                    float(np.exp(-rows.reference_nll[index])),
                    float(np.exp(-rows.candidate_nll[index])),
                )
            )
            self._worst = sorted(self._worst, key=lambda item: -item.kl)[:WORST]


def _without_runs(ids: NDArray[np.int64]) -> list[int]:
    """Ids with repetitions of the one before left out: an image is hundreds of the same placeholder."""
    keep = np.ones(len(ids), bool)
    keep[1:] = ids[1:] != ids[:-1]
    return [int(value) for value in ids[keep]]


def without_end(ids: NDArray[np.int64], eos: frozenset[int]) -> tuple[int, ...]:
    """An answer without the end token, as the engine gives it."""
    plain = tuple(int(value) for value in ids)
    return plain[:-1] if plain and plain[-1] in eos else plain


def _image_outcome(
    case: str, number: int, reference: NDArray[np.float32], candidate: NDArray[np.float32]
) -> ImageOutcome:
    angles = cosine(reference, candidate)
    scale = rms(reference)
    return ImageOutcome(
        case,
        number,
        float(angles.mean()),
        float(angles.min()),
        rms(candidate.astype(np.float64) - reference) / scale if scale else math.nan,
    )
