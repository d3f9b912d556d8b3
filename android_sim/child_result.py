"""What the child of a simulated run says when it is through: tokens, text, times, plan, parity.

In: numbers of the runtime, or JSON from a child that may be broken. Out: frozen records, and JSON. Knows
nothing of limits, samples and pipes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.record import read_record


@dataclass(frozen=True)
class PlanFacts:
    """How the runtime ran the bundle inside the limits, and why; see `runtime.plan.ModelPlan`.

    Attributes:
        prefill: what read the prompt.
        prefill_reason: a part of a sentence, as are the others.
        weights: where the decoder's weights were.
        weights_reason: why.
        threads: of one operator.
        threads_reason: why.
    """

    prefill: str
    prefill_reason: str
    weights: str
    weights_reason: str
    threads: int
    threads_reason: str

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True)
class ParityResult:
    """The bundle inside the limits against a recorded reference, over positions of the recorded answers.

    Attributes:
        cases: prompts that were compared.
        positions: scored.
        kl_mean: divergence in nats.
        kl_p99: its 99th percentile.
        top1_agreement: share of positions with the same likeliest token, 0 to 1.
        same_answers: greedy answers that are the recorded ones.
        taps: recorded taps that hit their box.
        taps_lost: those of them that miss it here.
        vision_cosine: mean over image features; None without images.
        faults: inputs that differ from the recorded ones, a sentence each.
    """

    cases: int
    positions: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    same_answers: int
    taps: int
    taps_lost: int
    vision_cosine: float | None
    faults: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True)
class ChildResult:
    """What the child says when it is through.

    Attributes:
        prompt_tokens: image tokens included.
        image_tokens: placeholders of all images.
        tokens: sampled, the one that ended the answer included.
        text: the answer.
        token_ids: of the answer.
        load_s: opening the bundle.
        image_s: reading and encoding images.
        prefill_s: running the prompt.
        decode_s: all tokens after the first.
        decoded_tokens: those that decode_s covers.
        weights_bytes: of the decoder, in the bundle.
        plan: how it ran.
        parity: None without a reference.
    """

    prompt_tokens: int
    image_tokens: int
    tokens: int
    text: str
    token_ids: tuple[int, ...]
    load_s: float
    image_s: float
    prefill_s: float
    decode_s: float
    decoded_tokens: int
    weights_bytes: int
    plan: PlanFacts
    parity: ParityResult | None = None

    def __post_init__(self) -> None:
        _check_counts(self)
        for name in ("load_s", "image_s", "prefill_s", "decode_s"):
            if not math.isfinite(value := getattr(self, name)):
                raise SimulationError(f"{name} of a child is {value}, must be finite")

    @property
    def decode_tokens_per_s(self) -> float:
        """Answer tokens per second on this host, the first one not counted; 0 if there was no second."""
        return self.decoded_tokens / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens per second on this host, image encoding not counted."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, names as here."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> ChildResult:
        """Read what `to_json` gave, from a child that may be broken.

        Raises:
            SimulationError: names or types are other ones.
        """
        try:
            return read_record(cls, document, "the child's result")
        except ValueError as error:
            raise SimulationError(f"{error}; report this with the bundle's manifest") from error


def _check_counts(record: PlanFacts | ParityResult | ChildResult) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, int) and value < 0:
            raise SimulationError(f"{item.name} of a child is {value}, must not be negative")
