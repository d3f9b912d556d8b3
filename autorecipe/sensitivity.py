"""Sensitivity: what one group of tensors costs when it alone is stored with fewer bits.

In: names of tensors, a bundle in which some of them are stored otherwise, and a reference. Out: groups of
tensors, and a `Measurement` of each bundle: the divergence at the positions of the reference's answers, as
`validate` has it. Knows nothing of how bundles are made, nor of budgets.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL

from autoglm_edge.errors import ParityError, RequestError
from autoglm_edge.parity.case import Case
from autoglm_edge.parity.metrics import Floats
from autoglm_edge.parity.reference import Reference
from autoglm_edge.parity.rows import compare
from autoglm_edge.parity.scoring import score_case
from autoglm_edge.parity.validate import check_inputs
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.engine import Engine
from autoglm_edge.runtime.reuse.options import ReuseOptions
from autoglm_edge.runtime.session import SessionOptions

from .measurements import Measurement

Grouping = Literal["matrix", "layer"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)

_STACK = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
_DECODER = "model.language_model.layers.*"
_ENDS = (
    ("embedding", "model.language_model.embed_tokens.weight"),
    ("head", "lm_head.weight"),
)
_KINDS: dict[Grouping, tuple[tuple[str, str], ...]] = {
    "matrix": (
        ("layers.{}.attention", f"{_DECODER}.self_attn.*.weight"),
        ("layers.{}.gate_up", f"{_DECODER}.mlp.gate_up_proj.weight"),
        ("layers.{}.down", f"{_DECODER}.mlp.down_proj.weight"),
        *_ENDS,
        ("vision.{}", "model.visual.blocks.*"),
        ("vision.merger", "model.visual.merger.*"),
        ("vision.merger", "model.visual.downsample.*"),
    ),
    "layer": (("layers.{}", _DECODER), *_ENDS, ("vision", "model.visual.*")),
}
"""Name of the group and pattern of its tensors; {} is the number of the layer.

The projections of an attention stay together: three of them read the same input, and keys and values are a
sixteenth of the queries. A block of the vision tower is 0.3 % of the 9B, so it is not divided."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that get their format together.

    Attributes:
        name: "layers.3.down", "head", "vision.0".
        patterns: of recipe rules that match these tensors and, but for other layers, no others that count.
        layer: number of the layer that the patterns are limited to, None if they are not.
        tensors: names of the tensors.
    """

    name: str
    patterns: tuple[str, ...]
    layer: int | None
    tensors: tuple[str, ...]


def group_tensors(names: Iterable[str], per: Grouping = "matrix") -> tuple[TensorGroup, ...]:
    """Sort tensors into groups.

    Args:
        names: of the tensors that a recipe decides about; biases and norms left out.
        per: "matrix": attention, gate_up_proj and down_proj of every layer, head, embedding, each block of
            the vision tower and what follows them. "layer": a layer is one group, and the tower is one.

    Returns:
        Groups in the order of their first tensor. A tensor of no known kind is a group of its own.

    Raises:
        RequestError: there is no such grouping.
    """
    if per not in GROUPINGS:
        raise RequestError(f"the grouping is {per!r}, must be one of {', '.join(GROUPINGS)}")
    patterns: dict[str, dict[str, None]] = {}
    tensors: dict[str, list[str]] = {}
    layers: dict[str, int | None] = {}
    for name in names:
        label, pattern = next(
            ((label, pattern) for label, pattern in _KINDS[per] if fnmatchcase(name, pattern)), (name, name)
        )
        stack = _STACK.search(name) if "{}" in label else None
        layer = int(stack[1]) if stack else None
        key = label.format(layer)
        patterns.setdefault(key, {})[pattern] = None
        tensors.setdefault(key, []).append(name)
        layers[key] = layer
    return tuple(
        TensorGroup(key, tuple(patterns[key]), layers[key], tuple(members))
        for key, members in tensors.items()
    )


def measure(
    bundle: Bundle,
    reference: Reference,
    *,
    prompts: int | None = None,
    options: SessionOptions | None = None,
    check: bool = False,
) -> Measurement:
    """Score the recorded answers with a bundle, prompts read by the decoder whatever this machine has.

    Args:
        bundle: of the model that was recorded, with the same pixel budget.
        reference: recorded.
        prompts: only the first so many; None for all.
        options: device and threads.
        check: refuse prompts that the engine prepares otherwise than it was recorded.

    Raises:
        ParityError: no answer has a position, a divergence is not finite, or an input differs from the
            recorded one.
    """
    started = time.perf_counter()
    counts: list[int] = []
    sums: list[float] = []
    total = len(reference) if prompts is None else min(prompts, len(reference))
    same_pillow = reference.fingerprint.versions.get("pillow") == PIL.__version__
    layout = reference.fingerprint.image_layout
    options = dataclasses.replace(options or SessionOptions(), prefill="decoder")
    with Engine(bundle, options=options, image_layout=layout, reuse=ReuseOptions.off()) as engine:
        for case in islice(reference.cases(), total):
            if check:
                _check_prompt(engine, case, reference.path, same_pillow)
            divergence = answer_divergence(engine, case)
            counts.append(len(divergence))
            sums.append(math.fsum(divergence))
    return Measurement(tuple(counts), tuple(sums), time.perf_counter() - started)


def answer_divergence(engine: Engine, case: Case) -> Floats:
    """KL(reference || engine) at each position of a case's answer, (m,) in nats."""
    if not case.in_answer.any():
        return np.zeros(0)
    rows = score_case(engine, case, case.pictures(), case.in_answer)
    return compare(case.rows.part(case.in_answer), rows).kl


def _check_prompt(engine: Engine, case: Case, path: Path, same_pillow: bool) -> None:
    prompt = engine.prompt(case.chat_messages(), max_tokens=max(1, len(case.answer)))
    faults = check_inputs(case, prompt, same_pillow=same_pillow)
    if faults:
        raise ParityError(
            f"prompt {case.name!r} of {path} is not prepared as it was recorded ({faults[0].detail}); "
            "record the reference again with this release"
        )
