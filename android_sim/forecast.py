"""The forecast: what a run would need and whether it fits, without running it.

In: a bundle, a budget and the size of a question. Out: a `Forecast`: bytes by item and phase, the verdict to
expect, the longest context and the largest picture that fit; and, beside a measured run, its error. The sums
are in need.py. Knows nothing of how limits are set up.

A sweep over mapped weights that is larger than what is left for it reads nearly all of them anew in each
pass: the page that is wanted next is the one dropped longest ago. So "thrash" is all or nothing here. Within
a few percent of the limit that is too dark: a kernel with compressed swap moves anonymous pages out until the
weights fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.plan import PREPARE_FROM_BYTES, Machine, ModelPlan, plan_model
from autoglm_edge.runtime.session import SessionOptions

from .budget import Budget
from .need import PHASES, SCREEN, Need, Question, Widths, need
from .trace import Trace

Expected = Literal["killed", "fits_thrash", "fits_swap", "fits"]
TEXT_TOKENS = 1500
"""Of system prompt and history, where no prompt is given: what a phone agent sends beside its screenshot."""


@dataclass(frozen=True)
class Reach:
    """How far something can grow.

    Attributes:
        alive: largest value with which the app is not killed; 0 if none.
        smooth: largest with which its weights also stay in memory; 0 if none.
        most: what the model itself allows.
    """

    alive: int
    smooth: int
    most: int


@dataclass(frozen=True)
class PhaseError:
    """Forecast and measurement of one peak.

    Attributes:
        what: "anonymous" or "mapped".
        phase: of the peak; "peak" is the whole run.
        forecast_bytes: foretold.
        measured_bytes: seen.
    """

    what: Literal["anonymous", "mapped"]
    phase: str
    forecast_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Forecast less measurement, as a share of the measurement."""
        return self.forecast_bytes / self.measured_bytes - 1 if self.measured_bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {**dataclasses.asdict(self), "error": round(self.error, 4)}


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run.

    Attributes:
        question: its size.
        plan: how it would be run: prefill, weights and reasons.
        need: by item and phase.
        limit_bytes: of the budget.
        swap_bytes: that were counted on top.
        expected: verdict.
        context: longest, in tokens of prompt and answer; the prompt's picture stays as it is.
        image: largest picture, in image tokens; the text stays as it is.
        pixels: what `image.alive` and `image.smooth` are in pixels of a still picture.
        reread_bytes_per_token: from storage in decoding, if it thrashes.
    """

    question: Question
    plan: ModelPlan
    need: Need
    limit_bytes: int
    swap_bytes: int
    expected: Expected
    context: Reach
    image: Reach
    pixels: tuple[int, int]
    reread_bytes_per_token: int

    @property
    def headroom_bytes(self) -> int:
        """The limit less the peak."""
        return self.limit_bytes - self.need.peak

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {
            "question": dataclasses.asdict(self.question),
            "plan": {
                "prefill": self.plan.prefill,
                "prefill_reason": self.plan.prefill_reason,
                "weights": self.plan.weights,
                "weights_reason": self.plan.weights_reason,
            },
            "items": [dataclasses.asdict(item) for item in self.need.items],
            "anonymous_bytes": {phase: self.need.anonymous(phase) for phase in PHASES},
            "mapped_bytes": {phase: self.need.mapped(phase) for phase in PHASES},
            "swept_bytes": {phase: self.need.swept(phase) for phase in PHASES},
            "peak_bytes": self.need.peak,
            "peak_phase": self.need.peak_phase,
            "limit_bytes": self.limit_bytes,
            "swap_bytes": self.swap_bytes,
            "headroom_bytes": self.headroom_bytes,
            "expected": self.expected,
            "reread_bytes_per_token": self.reread_bytes_per_token,
            "longest_context": dataclasses.asdict(self.context),
            "largest_image_tokens": dataclasses.asdict(self.image),
            "largest_image_pixels": {"alive": self.pixels[0], "smooth": self.pixels[1]},
            "notes": list(self.need.notes),
        }

    def errors(self, trace: Trace) -> tuple[PhaseError, ...]:
        """Compare with a run: the peak of anonymous memory in all and by phase, and the mapped working set.

        Phases that the run never finished, or that were seen in no sample, are left out; so is everything of
        a run that was killed, whose peak is the limit and not its need.
        """
        if not trace.completed:
            return ()
        every = ("start", *PHASES) if trace.during(*PHASES) else ()  # scoring is no part of a question
        found = [PhaseError("anonymous", "peak", self.need.peak, trace.peak_held(*every).bytes)]
        seen = [phase for phase in PHASES if trace.during(phase)]
        if not self.question.image_tokens:
            seen = [phase for phase in seen if phase != "image"]
        found += [
            PhaseError("anonymous", phase, self.need.anonymous(phase), trace.peak_held(phase).bytes)
            for phase in seen
        ]
        if trace.during("decode") and self.expected == "fits":
            mapped = max(self.need.mapped(phase) for phase in PHASES)
            found.append(PhaseError("mapped", "peak", mapped, trace.peak_file(*every).bytes))
        return tuple(found)


def usual_question(bundle: Bundle, context: int | None = None) -> Question:
    """A step of a phone agent on a bundle: system prompt and history, one screenshot, a short answer."""
    manifest = bundle.manifest
    most = min(context or manifest.geometry.context_length, manifest.geometry.context_length)
    picture = screen_tokens(bundle)
    if most < picture + 16:
        picture = 0
    answer = min(128, max(1, most // 8))
    return Question(max(1, min(TEXT_TOKENS + picture, most - answer)), picture, answer)


def screen_tokens(bundle: Bundle, size: tuple[int, int] = SCREEN) -> int:
    """Image tokens of a screenshot, within the bundle's budget; the rounding to whole blocks is left out."""
    image = bundle.manifest.image
    side = image.patch_size * image.merge_size
    return max(1, min(image.max_tokens, (size[0] // side) * (size[1] // side)))


def plan_for(bundle: Bundle, budget: Budget, options: SessionOptions, *, prepared: bool) -> ModelPlan:
    """How the runtime would run the bundle with the memory of a device.

    Args:
        bundle: opened.
        budget: its limit is the memory that is there.
        options: wishes; its threads are the host's own business.
        prepared: whether prepared weights are there: an app ships them or makes them once.

    Raises:
        DeviceError: this CPU would compute the bundle wrongly.
        RequestError: the options ask for what the bundle does not have.
    """
    here = Machine.of(bundle)
    parts = bundle.manifest.parts
    large = options.weights == "prepared" or parts["decoder"].weight_bytes >= PREPARE_FROM_BYTES
    machine = dataclasses.replace(
        here,
        available_bytes=budget.limit_bytes,
        is_prepared=lambda part: (prepared and large) or here.is_prepared(part),
        room=lambda part: "" if prepared else "the device has no room for them",
    )
    return plan_model(bundle, dataclasses.replace(options, kernels=False), machine)


def foretell(
    bundle: Bundle,
    budget: Budget,
    *,
    question: Question | None = None,
    options: SessionOptions | None = None,
    prepared: bool = True,
    swap_bytes: int = 0,
) -> Forecast:
    """Forecast a run.

    Args:
        bundle: opened.
        budget: of device and state.
        question: its size; default a step of a phone agent.
        options: wishes for weights and prefill.
        prepared: whether prepared weights of decoder and vision tower are there; "auto" takes them only for
            large bundles.
        swap_bytes: counted on top of the limit; 0 is what a host without compressed memory can check.

    Raises:
        SimulationError: the question is longer than the model's context.
        BundleError: the index of layers is damaged.
        DeviceError: this CPU would compute the bundle wrongly.
        RequestError: the options ask for what the bundle does not have.
    """
    options = options or SessionOptions()
    asked = question or usual_question(bundle)
    manifest = bundle.manifest
    most = manifest.geometry.context_length
    if asked.tokens > most:
        raise SimulationError(
            f"prompt and answer have {asked.tokens} tokens, the model has positions for {most}; ask for less"
        )
    plan, widths = plan_for(bundle, budget, options, prepared=prepared), Widths.of(bundle)

    def judge(item: Question) -> Expected:
        return expect(need(bundle, plan, item, widths), budget.limit_bytes, swap_bytes)

    def longer(tokens: int) -> Expected:
        answer = min(asked.answer_tokens, max(0, tokens - 1))
        prompt = tokens - answer
        image = min(asked.image_tokens, prompt)
        return judge(Question(prompt, image, answer, asked.source_pixels))

    text = asked.prompt_tokens - asked.image_tokens
    image = manifest.image
    widest = max(0, min(image.max_tokens, most - text - asked.answer_tokens))

    def larger(tokens: int) -> Expected:
        return judge(Question(text + tokens, tokens, asked.answer_tokens, asked.source_pixels))

    own = need(bundle, plan, asked, widths)
    expected = expect(own, budget.limit_bytes, swap_bytes)
    picture = _reach(larger, widest) if text + widest else Reach(0, 0, 0)
    pixels = image.pixels_per_token // image.temporal_patch_size
    return Forecast(
        question=asked,
        plan=plan,
        need=own,
        limit_bytes=budget.limit_bytes,
        swap_bytes=swap_bytes,
        expected=expected,
        context=_reach(longer, most),
        image=picture,
        pixels=(picture.alive * pixels, picture.smooth * pixels),
        reread_bytes_per_token=own.swept("decode") if expected == "fits_thrash" else 0,
    )


def expect(found: Need, limit_bytes: int, swap_bytes: int = 0) -> Expected:
    """The verdict that a need leads to under a limit."""
    if found.peak > limit_bytes + swap_bytes:
        return "killed"
    held = found.anonymous("decode")
    if min(held, limit_bytes) + found.swept("decode") > limit_bytes:
        return "fits_thrash"
    return "fits_swap" if held > limit_bytes else "fits"


def _reach(judge: Callable[[int], Expected], most: int) -> Reach:
    """Largest values up to `most` that live, and that live well; more never fits where less does not."""

    def largest(good: tuple[Expected, ...]) -> int:
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if judge(middle) in good else (low, middle - 1)
        return low

    return Reach(largest(("fits", "fits_swap", "fits_thrash")), largest(("fits", "fits_swap")), most)
