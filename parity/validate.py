"""Validation: a bundle against a recorded reference, through the normal engine.

In: a bundle and a reference file; where wanted, further files recorded along it: a floor (the same weights in
another dtype) and baselines. Out: a `Report`. Every prompt goes the way a user's goes: messages through the
engine's own template, tokenizer, image processor and positions, which must give what was recorded; then the
recorded answer is scored token by token, and the prompt is answered greedily. Knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from autoglm_edge.errors import ParityError, RequestError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.prompt.build import Prompt
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import Device, Prefill, SessionOptions

from .case import Case, patches_sha256
from .comparison import Collector, Comparison, Observed, without_end
from .limits import LIMITS, Criterion, Limits, at_least, at_most, limits_for, share_at_least, share_at_most
from .reference import Reference
from .report import InputFault, Report, Subject
from .scoring import score_case

Progress = Callable[[str, int, int], None]


def validate(
    bundle: str | Path,
    reference: str | Path,
    *,
    floor: str | Path | None = None,
    baselines: Sequence[str | Path] = (),
    device: Device = "cpu",
    threads: int = 0,
    max_image_tokens: int | None = None,
    prefill: Prefill = "auto",
    limits: Limits | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with a reference.

    Args:
        bundle: folder.
        reference: file of `autoglm record`.
        floor: the same checkpoint recorded along the reference in another dtype; what it loses is added to
            the limits, since nothing below it can be told from rounding.
        baselines: more files recorded along the reference, shown beside the bundle.
        device: of the engine.
        threads: of the engine; 0 for one per core.
        max_image_tokens: of the engine; must give the pixel budget of the reference.
        prefill: what reads prompts, as in `SessionOptions`.
        limits: a row of limits.LIMITS by name, or your own; default: what the bundle's recipe asks for.
        progress: called with a prompt's name, the number done and the number in all.

    Raises:
        BundleError: no usable bundle.
        ParityError: a file is no reference or damaged; or it was recorded from another model, tokenizer,
            template or pixel budget; or a floor or baseline was not recorded along the reference.
        DeviceError: the device is not there.
        DependencyError: safetensors is not installed.
        RequestError: there are no such limits.
    """
    started = time.perf_counter()
    opened = Bundle.open(bundle)
    first = Reference.open(reference)
    others = [Reference.open(path) for path in ([floor] if floor else []) + list(baselines)]
    chosen = _limits(limits, opened)
    with Engine(
        opened,
        options=SessionOptions(device, threads, prefill=prefill, prepare=False),
        reuse=ReuseOptions.off(),
        image_layout=first.fingerprint.image_layout,
        max_image_tokens=max_image_tokens,
    ) as engine:
        _check_same_model(engine, first)
        for other in others:
            _check_along(first, other)
        eos = frozenset(opened.manifest.tokens.eos)
        title = str(opened.manifest.recipe.get("name", "bundle"))
        collectors = [
            Collector(name, _decoder(engine), engine.tokenizer.decode, eos)
            for name in (
                title,
                *(_title(other, index == 0 and bool(floor)) for index, other in enumerate(others)),
            )
        ]
        faults = _run(engine, first, others, collectors, progress or (lambda case, done, count: None))
    own, *rest = (collector.result() for collector in collectors)
    baseline = rest[0] if floor else None
    return Report(
        bundle=_subject(opened),
        reference=str(first.path),
        reference_sha256=first.sha256,
        fingerprint=first.fingerprint,
        limits=chosen.name,
        cases=len(first),
        faults=tuple(faults),
        candidate=own,
        floor=baseline,
        baselines=tuple(item for item in rest[1 if floor else 0 :] if item is not None),
        criteria=tuple(judge(own, baseline, faults, chosen, len(first))),
        seconds=time.perf_counter() - started,
    )


def _run(
    engine: Engine,
    first: Reference,
    others: Sequence[Reference],
    collectors: Sequence[Collector],
    tell: Progress,
) -> list[InputFault]:
    """Put every case to the engine and to the recorded candidates; returns what is wrong with the inputs."""
    faults: list[InputFault] = []
    same_pillow = first.fingerprint.versions.get("pillow") == PIL.__version__
    streams: list[Iterator[Case]] = [other.cases() for other in others]
    for index, case in enumerate(first.cases()):
        tell(case.name, index, len(first))
        pictures = case.pictures()
        size = pictures[-1].size if pictures else None
        prompt = engine.prompt(case.chat_messages(), max_tokens=max(1, len(case.answer)))
        found = check_inputs(case, prompt, same_pillow=same_pillow)
        faults += found
        for collector, stream in zip(collectors[1:], streams, strict=True):
            along = next(stream)
            _check_same_case(case, along)
            collector.add(case, _recorded(along, collector.eos), size=size)
        if not any(fault.fatal for fault in found):
            collectors[0].add(case, observe(engine, case, prompt, pictures), size=size)
    tell("", len(first), len(first))
    return faults


def check_inputs(case: Case, prompt: Prompt, *, same_pillow: bool = True) -> list[InputFault]:
    """Compare what the engine would run with what the reference ran.

    Args:
        case: recorded.
        prompt: the engine's, of the same messages.
        same_pillow: whether both resized with the same Pillow; another release may round pixels otherwise,
            and then patches are not compared.

    Returns:
        Faults; a fatal one means that the case cannot be scored.
    """
    faults = []
    grids = tuple(image.grid for image in prompt.images)
    for number, (ours, theirs) in enumerate(zip(grids, case.grids, strict=False)):
        if ours != theirs:
            detail = f"image {number} becomes {_grid(ours)} patches, recorded are {_grid(theirs)}"
            faults.append(InputFault(case.name, "grid", detail, fatal=True))
    if not faults and same_pillow:
        digests = [patches_sha256(image) for image in prompt.images]
        for number, (found, wanted) in enumerate(zip(digests, case.patches_sha256, strict=False)):
            if found != wanted:
                faults.append(InputFault(case.name, "patches", f"image {number} has other pixel values"))
    if not np.array_equal(prompt.ids, case.ids):
        detail = _difference(prompt.ids, case.ids)
        fatal = bool(faults and faults[0].fatal)
        faults.append(InputFault(case.name, "ids", detail, fatal=fatal))
    elif not np.array_equal(prompt.positions, case.positions):
        axis, token = (int(value) for value in np.argwhere(prompt.positions != case.positions)[0])
        ours, theirs = prompt.positions[axis, token], case.positions[axis, token]
        detail = f"token {token} has {('time', 'height', 'width')[axis]} {ours}, recorded is {theirs}"
        faults.append(InputFault(case.name, "positions", detail))
    return faults


def observe(engine: Engine, case: Case, prompt: Prompt, pictures: Sequence[Image.Image]) -> Observed:
    """Let the engine score a case's sequence and answer its prompt.

    Args:
        engine: of the bundle.
        case: of the reference.
        prompt: the engine's own, whose patches give the vision features.
        pictures: the case's, decoded.
    """
    rows = score_case(engine, case, pictures)
    greedy: list[int] = []
    for delta in engine.chat(case.chat_messages(), max_tokens=max(1, case.max_tokens)):
        greedy += delta.token_ids
    features = tuple(
        engine.encode_image(image)[indices]
        for image, (indices, _) in zip(prompt.images, case.features, strict=True)
    )
    return Observed(rows, tuple(greedy), features)


def _recorded(case: Case, eos: frozenset[int]) -> Observed:
    return Observed(case.rows, without_end(case.greedy, eos), tuple(values for _, values in case.features))


def judge(
    own: Comparison | None,
    floor: Comparison | None,
    faults: Sequence[InputFault],
    limits: Limits,
    cases: int,
) -> Iterator[Criterion]:
    """Hold figures against limits.

    Args:
        own: of the bundle; None if no case could be scored.
        floor: of the reference's own rounding, which is added to the limits; None without one.
        faults: inputs that are not as recorded.
        limits: the row to judge by.
        cases: prompts in the reference.
    """
    yield at_most("inputs that differ from the recorded ones", float(len(faults)), 0, None)
    scored = 0 if own is None else own.cases
    yield at_least("prompts that could be scored", float(scored), float(cases))
    if own is None:
        return
    lower = None if floor is None else floor.answer.kl
    yield at_most(
        "mean KL divergence", own.answer.kl.mean, limits.mean_kl, None if lower is None else lower.mean
    )
    yield at_most(
        "99th percentile of KL", own.answer.kl.p99, limits.p99_kl, None if lower is None else lower.p99
    )
    top1 = limits.top1 if floor is None else limits.top1 - (1 - floor.answer.top1.value)
    yield share_at_least("same likeliest token", own.answer.top1, top1)
    if own.images:
        yield at_least("mean cosine of vision features", own.vision_cosine, limits.vision_cosine)
    if own.actions.lost.total:
        yield share_at_most("taps in the box that were lost", own.actions.lost, limits.lost_taps)


def _limits(limits: Limits | str | None, bundle: Bundle) -> Limits:
    if isinstance(limits, str):
        if limits not in LIMITS:
            raise RequestError(f"there are no limits {limits!r}; take one of {', '.join(LIMITS)}")
        return LIMITS[limits]
    return limits or limits_for(bundle.manifest.recipe)


def _check_same_model(engine: Engine, reference: Reference) -> None:
    """Refuse a reference whose figures would say nothing about this bundle."""
    bundle, wanted = engine.bundle, reference.fingerprint
    source = bundle.manifest.source
    if source.config_sha256 != wanted.config_sha256:
        raise ParityError(
            f"{reference.path} was recorded from {wanted.model} (config {wanted.config_sha256[:12]}), but "
            f"{bundle.path} was made from {source.model} (config {source.config_sha256[:12]}); record a "
            "reference from the bundle's own checkpoint"
        )
    if bundle.manifest.geometry.vocab != wanted.vocab:
        raise ParityError(
            f"{reference.path} has a vocabulary of {wanted.vocab}, {bundle.path} one of "
            f"{bundle.manifest.geometry.vocab}; record a reference from the bundle's own checkpoint"
        )
    for what, name, digest in (
        ("tokenizer", "tokenizer.json", wanted.tokenizer_sha256),
        ("chat template", "chat_template.jinja", wanted.template_sha256),
    ):
        if hashlib.sha256(bundle.file(name).read_bytes()).hexdigest() != digest:
            raise ParityError(
                f"{reference.path} was recorded with another {what} than the one in {bundle.path}; record it "
                "again from the bundle's own checkpoint"
            )
    if engine.image != wanted.image:
        raise ParityError(
            f"{reference.path} was recorded with up to {wanted.image.max_tokens} tokens per image "
            f"(max_pixels {wanted.image.max_pixels}), the bundle takes up to {engine.image.max_tokens} "
            f"(max_pixels {engine.image.max_pixels}) or prepares images otherwise; record with the bundle's "
            "--max-image-tokens"
        )


def _check_along(first: Reference, other: Reference) -> None:
    if other.names != first.names:
        raise ParityError(
            f"{other.path} was not recorded along {first.path}; record it with --like {first.path.name}"
        )


def _check_same_case(case: Case, along: Case) -> None:
    same = (
        np.array_equal(case.sequence, along.sequence)
        and np.array_equal(case.places, along.places)
        and np.array_equal(case.rows.top_ids, along.rows.top_ids)
        and len(case.features) == len(along.features)
        and all(a.shape == b.shape for (_, a), (_, b) in zip(case.features, along.features, strict=True))
    )
    if not same:
        raise ParityError(
            f"case {case.name!r} of a floor or baseline has other tokens than the reference; record it "
            "with --like"
        )


def _title(reference: Reference, is_floor: bool) -> str:
    return f"{'floor: ' if is_floor else ''}{reference.fingerprint.title}"


def _subject(bundle: Bundle) -> Subject:
    manifest = bundle.manifest
    return Subject(
        str(bundle.path),
        bundle.fingerprint,
        manifest.source.model,
        str(manifest.recipe.get("name", "")),
        manifest.total_bytes,
    )


def _decoder(engine: Engine) -> Callable[[Sequence[int]], str]:
    return lambda ids: engine.tokenizer.decode(ids, skip_special=True)


def _difference(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> str:
    if len(ours) != len(theirs):
        return f"the prompt has {len(ours)} tokens, recorded are {len(theirs)}"
    place = int(np.flatnonzero(ours != theirs)[0])
    return f"token {place} is {ours[place]}, recorded is {theirs[place]}"


def _grid(grid: tuple[int, int, int]) -> str:
    return f"{grid[1]} x {grid[2]}"
