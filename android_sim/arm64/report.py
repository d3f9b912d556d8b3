"""What came of a check on ARM: distances, tolerances with their reasons, a table and a document.

In: logits of two machines at the same places. Out: frozen reports. Knows nothing of emulators and engines.

Two CPUs with different kernels do not compute the same bits. How far apart they may be depends on what the
kernels do, and not on the model's size: an order of sums is one thing, a rounding to bytes that one side does
and the other does not is another. A tolerance therefore belongs to a kind of arithmetic (`tolerance_of`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import SimulationError
from autoglm_edge.parity.metrics import common_prefix, kl_divergence
from autoglm_edge.runtime.manifest import Manifest


@dataclass(frozen=True)
class Tolerance:
    """How far logits of two machines may be apart.

    Attributes:
        rms: of `LogitsDistance.rms`.
        kl_mean: of `LogitsDistance.kl_mean`, in nats.
        reason: why they are apart at all, and why by so much.
    """

    rms: float
    kl_mean: float
    reason: str


FLOATS = Tolerance(
    1e-4,
    1e-7,
    "nothing is rounded to bytes or halves, so only the order differs in which floats are added up; "
    "measured: 1.1e-6 to 1.4e-6",
)
HALVES = Tolerance(
    4e-2,
    5e-3,
    "a CPU with half-precision arithmetic adds up in float16, where this machine goes through float32; "
    "measured: 8e-4 without such arithmetic, 1.0e-2 with it",
)
ROUNDED = Tolerance(
    4e-2,
    5e-3,
    "the inputs of quantized products are rounded to bytes. One last bit moves an input across a rounding "
    "edge, and after a few layers two machines round as if independently: they are as far apart as rounding "
    "moves this machine alone (1.4e-2, measured with --accuracy-level 0 against 4; 4-bit weights move it by "
    "1.5e-1)",
)
KLEIDIAI = Tolerance(
    8e-2,
    1e-2,
    "Arm's KleidiAI rounds the inputs of symmetric 4-bit products with one scale per row, this machine with "
    "one per block, which is finer; measured: 2.5e-2",
)


def tolerance_of(manifest: Manifest, *, prefill: str, pictures: bool, kleidiai: bool) -> Tolerance:
    """The tolerance for the arithmetic of a bundle.

    Args:
        manifest: of the bundle. A recipe that says nothing counts as one that rounds.
        prefill: what reads prompts; all but the decoder round.
        pictures: the vision graph is run, too.
        kleidiai: Arm's kernels are used where they can be.
    """
    blocks = manifest.recipe.get("accuracy_level") != 0
    run = ("decoder", "vision") if pictures else ("decoder",)
    whole = any(part in manifest.parts and manifest.parts[part].integer for part in run)
    if blocks and kleidiai:
        return KLEIDIAI
    if blocks or whole or prefill != "decoder" or _has_channels(manifest.recipe.get("rules")):
        return ROUNDED
    return HALVES if manifest.activations == "float16" else FLOATS


def _has_channels(rules: object) -> bool:
    """Whether a matrix may have one scale per channel, whose products are of bytes."""
    formats = (
        [rule.get("format") for rule in rules if isinstance(rule, Mapping)] if isinstance(rules, list) else []
    )
    return any(isinstance(form, Mapping) and form.get("per") == "channel" for form in formats)


@dataclass(frozen=True)
class LogitsDistance:
    """Logits of this machine (P) and of the ARM CPU (Q) at the same places.

    Attributes:
        positions: how many.
        rms: root mean square of the differences over that of P, each row less its mean: adding a constant to
            a row changes no probability.
        highest: largest difference, in units of logits.
        kl_mean: mean of KL(P || Q), in nats.
        kl_max: its maximum.
        top1_agreement: share of places with the same likeliest token.
    """

    positions: int
    rms: float
    highest: float
    kl_mean: float
    kl_max: float
    top1_agreement: float


def compare_logits(here: NDArray[np.float32], there: NDArray[np.float32]) -> LogitsDistance:
    """Measure.

    Args:
        here: (n, V) of this machine.
        there: (n, V) of the ARM CPU.

    Raises:
        SimulationError: they are not of the same places, or not all finite.
    """
    if here.shape != there.shape or here.ndim != 2 or not here.size:
        raise SimulationError(
            f"logits here have the shape {here.shape}, on ARM {there.shape}, so they are not of one sequence"
        )
    p, q = here.astype(np.float64), there.astype(np.float64)
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        side = "here" if not np.isfinite(p).all() else "on ARM"
        raise SimulationError(f"logits {side} are not all finite numbers, so there is nothing to compare")
    kl = kl_divergence(p, q)
    delta = q - p
    centred = delta - delta.mean(axis=1, keepdims=True)
    scale = float(np.sqrt(np.mean((p - p.mean(axis=1, keepdims=True)) ** 2)))
    return LogitsDistance(
        positions=len(p),
        rms=float(np.sqrt(np.mean(centred**2))) / max(scale, 1e-30),
        highest=float(np.abs(delta).max()),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float(np.mean(p.argmax(axis=1) == q.argmax(axis=1))),
    )


def lead(
    logits: NDArray[np.float32], answer: Sequence[int], other: Sequence[int], eos: Sequence[int]
) -> float | None:
    """By how much the model preferred its own token where another answer goes its own way.

    Args:
        logits: (n, V), row i before token i of the answer.
        answer: tokens of these logits, without the one that ended it.
        other: tokens of the other answer.
        eos: ids that end an answer.

    Returns:
        The difference of the two tokens' logits; None if the answers are equal.
    """
    if list(answer) == list(other):
        return None
    place = common_prefix(answer, other)
    row = logits[place].astype(np.float64)

    def score(tokens: Sequence[int]) -> float:
        return float(row[tokens[place]] if place < len(tokens) else row[list(eos)].max())

    return score(answer) - score(other)


@dataclass(frozen=True)
class ArmRun:
    """One way of asking on one CPU, beside the same here.

    Attributes:
        cpu: its name.
        prefill: what read the prompt.
        kleidiai: Arm's kernels were used where they can be.
        same_prompt: the token ids of the prompt are equal.
        tokens: greedy answer there.
        tokens_here: greedy answer here.
        logits: distance, at the places of the answer here.
        lead: of the token here over the one there, in logits, where the answers part; None if they do not.
        features_rms: relative distance of the picture's features; None without a picture.
        tolerance: what is allowed.
        seconds: of loading, answering and scoring, emulated; says nothing of a device.
    """

    cpu: str
    prefill: str
    kleidiai: bool
    same_prompt: bool
    tokens: tuple[int, ...]
    tokens_here: tuple[int, ...]
    logits: LogitsDistance
    lead: float | None
    features_rms: float | None
    tolerance: Tolerance
    seconds: float

    @property
    def is_tie(self) -> bool:
        """The answers part where the lead is no larger than the distance of the two machines' logits."""
        return self.lead is not None and self.lead <= self.logits.highest

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong; empty if the run passes."""
        found = []
        if not self.same_prompt:
            found.append("another prompt")
        if self.tokens != self.tokens_here and not self.is_tie:
            found.append("other tokens")
        if not self.logits.rms <= self.tolerance.rms:
            found.append(f"logits rms {self.logits.rms:.1e}, allowed {self.tolerance.rms:.0e}")
        if not self.logits.kl_mean <= self.tolerance.kl_mean:
            found.append(f"mean KL {self.logits.kl_mean:.1e}, allowed {self.tolerance.kl_mean:.0e}")
        if self.features_rms is not None and not self.features_rms <= self.tolerance.rms:
            found.append(f"image features {self.features_rms:.1e}, allowed {self.tolerance.rms:.0e}")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Fields by name, and the verdict."""
        return asdict(self) | {"faults": list(self.faults), "tie": self.is_tie, "passed": not self.faults}


@dataclass(frozen=True)
class Arm64Report:
    """A bundle on emulated ARM CPUs.

    Attributes:
        bundle: its folder.
        fingerprint: of it.
        onnxruntime: version on the ARM side.
        onnxruntime_here: version here.
        machine: architecture here.
        prompt_tokens: of the question.
        images: pictures of the question.
        text: the answer here.
        runs: one for each CPU and way.
        signature: of the index of Debian's packages.
        fetch_s: seconds until everything was there.
        total_s: seconds of all.
    """

    bundle: str
    fingerprint: str
    onnxruntime: str
    onnxruntime_here: str
    machine: str
    prompt_tokens: int
    images: int
    text: str
    runs: tuple[ArmRun, ...]
    signature: str
    fetch_s: float
    total_s: float

    @property
    def passed(self) -> bool:
        """Every run passes, and there is one."""
        return bool(self.runs) and not any(run.faults for run in self.runs)

    def to_document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        document = {key: value for key, value in vars(self).items() if key != "runs"}
        return {**document, "passed": self.passed, "runs": [run.to_json() for run in self.runs]}

    def to_json(self) -> str:
        """The document as one line; numbers that are not finite become null."""
        return json.dumps(_finite(self.to_document()), ensure_ascii=False)

    def to_table(self) -> str:
        """Lines for a terminal."""
        lines = [
            f"{self.bundle} on emulated ARM, onnxruntime {self.onnxruntime} (here {self.onnxruntime_here} on "
            f"{self.machine})",
            f"prompt of {self.prompt_tokens} tokens, {self.images} pictures; answer here: {self.text!r}",
            "",
            "cpu          prefill  kleidiai  tokens       logits rms (may)   mean KL (may)   top-1   verdict",
        ]
        for run in self.runs:
            tokens = "equal" if run.tokens == run.tokens_here else "tie" if run.is_tie else "differ"
            lines.append(
                f"{run.cpu:12} {run.prefill:8} {'on' if run.kleidiai else 'off':8}  "
                f"{tokens:6} {len(run.tokens):4}  {run.logits.rms:8.1e} ({run.tolerance.rms:.0e})    "
                f"{run.logits.kl_mean:8.1e} ({run.tolerance.kl_mean:.0e})  {run.logits.top1_agreement:6.1%}  "
                f"{'; '.join(run.faults) or 'passes'}"
            )
        reasons = dict.fromkeys(run.tolerance.reason for run in self.runs)
        lines += ["", *(f"- {reason}" for reason in reasons)]
        lines.append(f"Took {self.total_s:.0f} s; seconds of an emulator say nothing of a device.")
        return "\n".join(lines)


@dataclass(frozen=True)
class PreparedArm:
    """Prepared weights for an ARM CPU.

    Attributes:
        cpu: made on.
        onnxruntime: made by, and for.
        folders: one for each part.
        bytes: of all.
    """

    cpu: str
    onnxruntime: str
    folders: tuple[str, ...]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
