"""How a bundle will run on this machine: which graph reads prompts, where weights are, how many threads.

In: the manifest, the options, and facts of the machine. Out: a `ModelPlan` with a reason for each choice.
Loads nothing, so that it can be shown before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from autoglm_edge.errors import DeviceError, RequestError

from .bundle import Bundle
from .layerwise.expansion import COMPILED
from .machine.integers import Integers, integers
from .machine.limits import available_bytes
from .machine.prepared import prepared_state, room_for
from .machine.topology import choose_threads
from .manifest import Manifest
from .native.layers import can_run_natively
from .native.unit import Unit, best_unit, unit_reason
from .session import PromptReader, SessionOptions

PREPARE_FROM_BYTES = 1_000_000_000
"""Least weights of a decoder that are prepared without being asked for: smaller ones pack in a second."""
PREFILL_FROM_TOKENS = 32
"""Shortest piece of a prompt for the prefill graph: it reads twice the decoder's bytes, so few do not pay."""
LAYERS_FROM_TOKENS = {True: 128, False: 320}
"""Shortest prompt that is read layer by layer, by whether the expansion is compiled: it takes the time that
is saved on some tokens. Compare `autoglm bench --prompts layers` with `--prompts decoder`."""
PREFILL_CHUNK = 512
"""Tokens per run of a prefill; bounds its activations."""
LAYERS_CHUNK = 4096
"""The same where each layer's weights are expanded anew for every such piece: hidden states of 200 MB."""
NATIVE_CHUNK = 2048
"""The same for the compiled kernels, which hold all activations of a piece at once: 200 MB at 9B. Weights are
expanded once per piece, which takes as long as some 100 tokens."""
PREPARED_PARTS = ("decoder", "vision")
"""The embedding packs nothing, and the prefill graph runs well from its own file."""


@dataclass(frozen=True)
class ModelPlan:
    """What was chosen, and why.

    Attributes:
        prefill: what reads prompts: "native" are compiled kernels, "integer" is the bundle's prefill graph,
            "layers" the graph of one layer, with the decoder's weights expanded to 8 bits.
        prefill_reason: a part of a sentence, as are the others.
        weights: where the decoder's weights are while it runs.
        weights_reason: why.
        threads: of one operator.
        threads_reason: why.
        prepare: prepared weights are to be made first.
        widened: the vision graph stores its 8-bit weights in another form, for exact products.
        prompt_from: tokens of the shortest prompt that does not go through the decoder.
    """

    prefill: PromptReader
    prefill_reason: str
    weights: Literal["mapped", "packed", "prepared"]
    weights_reason: str
    threads: int
    threads_reason: str
    prepare: bool = False
    widened: bool = False
    prompt_from: int = PREFILL_FROM_TOKENS

    def by_decoder(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens before its last one goes through the decoder."""
        return self.prefill == "decoder" or tokens < self.prompt_from

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that are run at once, at most."""
        return {"layers": LAYERS_CHUNK, "native": NATIVE_CHUNK}.get(self.prefill, PREFILL_CHUNK)

    @property
    def takes_breaks(self) -> bool:
        """Whether prompts are read layer by layer, so that others may run in between."""
        return self.prefill in ("layers", "native")


@dataclass(frozen=True)
class Machine:
    """What a plan depends on beside bundle and options.

    Attributes:
        available_bytes: memory that can be taken, None if unknown.
        integers: 8-bit products.
        is_prepared: whether prepared weights of a part are there.
        room: why prepared weights of a part cannot be made; "" if they can.
        compiled: whether layers are expanded by compiled loops.
        unit: what the compiled kernels for whole layers would use.
    """

    available_bytes: int | None
    integers: Integers
    is_prepared: Callable[[str], bool]
    room: Callable[[str], str]
    compiled: bool = COMPILED
    unit: Unit = Unit.NONE

    @classmethod
    def of(cls, bundle: Bundle) -> Machine:
        """This one."""
        return cls(
            available_bytes(),
            integers(),
            lambda part: prepared_state(bundle, part).ready,
            lambda part: room_for(bundle, part),
            unit=best_unit(),
        )


def plan_model(bundle: Bundle, options: SessionOptions, machine: Machine | None = None) -> ModelPlan:
    """Choose.

    Raises:
        DeviceError: this CPU would compute the bundle's decoder wrongly.
        RequestError: the options ask for what the bundle does not have.
    """
    manifest = bundle.manifest
    threads = choose_threads(options.threads)
    if options.device != "cpu":
        _refuse(options, manifest)
        reason = f"the weights are on the device {options.device}"
        return ModelPlan("decoder", reason, "packed", reason, threads.count, threads.reason)
    machine = machine or Machine.of(bundle)
    if is_integer(manifest, "decoder") and not machine.integers.exact:
        raise DeviceError(
            f"{bundle.path} has its decoder in 8-bit integers, but {machine.integers.reason}, so its answers "
            "would be wrong; export the checkpoint with --precision int8-blocks or int4"
        )
    weights, weights_reason, build = _weights(manifest, options, machine)
    prefill, prefill_reason = _prefill(bundle, options, machine)
    return ModelPlan(
        prefill,
        prefill_reason,
        weights,
        weights_reason,
        threads.count,
        threads.reason,
        prepare=build,
        widened=is_integer(manifest, "vision") and not machine.integers.exact,
        prompt_from=LAYERS_FROM_TOKENS[machine.compiled]
        if prefill == "layers" and options.prefill == "auto"
        else PREFILL_FROM_TOKENS,
    )


def is_integer(manifest: Manifest, part: str) -> bool:
    """Whether all products of a part are of 8-bit integers, so that it runs well without packing."""
    return part in manifest.parts and manifest.parts[part].integer


def _refuse_native(bundle: Bundle, machine: Machine) -> None:
    if not can_run_natively(bundle):
        raise RequestError(
            "prefill 'native' needs a bundle with 4-bit matrices, keys and values in float32 and the part "
            "layer of this release, which this one is without; export the checkpoint again, or leave prefill "
            "out"
        )
    if machine.unit != Unit.MATRICES:
        raise DeviceError(f"prefill 'native' needs AMX, but {unit_reason()}; leave prefill out")


def _refuse(options: SessionOptions, manifest: Manifest) -> None:
    if options.weights not in ("auto", "packed"):
        raise RequestError(f"weights {options.weights!r} are for device 'cpu'; leave weights out")
    if options.prefill in ("integer", "native"):
        raise RequestError(f"prefill {options.prefill!r} is for device 'cpu'; leave prefill out")


def _weights(
    manifest: Manifest, options: SessionOptions, machine: Machine
) -> tuple[Literal["mapped", "packed", "prepared"], str, bool]:
    """Where, why, and whether they must be prepared first."""
    integer = is_integer(manifest, "decoder")
    if options.weights == "packed":
        return "packed", "asked for", False
    if options.weights == "mapped":
        if not integer:
            raise RequestError(
                "weights 'mapped' need a decoder in 8-bit integers, which this bundle's is not; take "
                "'prepared', or export the checkpoint with --precision int8"
            )
        return "mapped", "asked for", False
    ready = machine.is_prepared("decoder")
    if options.weights == "prepared":
        return "prepared", "asked for", not ready
    if ready:
        return "prepared", "they are there", False
    size = manifest.parts["decoder"].weight_bytes
    if size < PREPARE_FROM_BYTES:
        return "packed", "small enough to be packed at each load", False
    missing = machine.room("decoder") if options.prepare else "not prepared, and preparing is off"
    if not missing:
        return "prepared", "made at the first load", True
    if integer and (machine.available_bytes is None or machine.available_bytes < 2 * size):
        return "mapped", f"{missing}; a packed copy would take half of the memory or more", False
    return "packed", missing, False


def _prefill(bundle: Bundle, options: SessionOptions, machine: Machine) -> tuple[PromptReader, str]:
    """What reads prompts, and why."""
    manifest, asked = bundle.manifest, options.prefill
    if asked == "decoder":
        return "decoder", "asked for"
    if asked == "native":
        _refuse_native(bundle, machine)
        return "native", f"asked for; from {PREFILL_FROM_TOKENS} tokens on"
    if asked == "auto" and options.kernels and machine.unit == Unit.MATRICES and can_run_natively(bundle):
        return "native", f"compiled kernels on AMX; from {PREFILL_FROM_TOKENS} tokens on"
    if asked == "integer" and "prefill" not in manifest.parts:
        raise RequestError(
            "prefill 'integer' needs a bundle with the part prefill, which this one is without; export "
            "the checkpoint again with --prefill int8, or leave prefill out"
        )
    if asked == "layers" and "layer" not in manifest.parts:
        raise RequestError(
            "prefill 'layers' needs a bundle with 4-bit matrices and the part layer, which this one is "
            "without; export the checkpoint again, or leave prefill out"
        )
    if not {"prefill", "layer"} & manifest.parts.keys():
        return "decoder", "the bundle has no prefill graph"
    if not machine.integers.exact:
        if asked != "auto":
            raise DeviceError(
                f"prefill {asked!r} would be wrong here: {machine.integers.reason}; leave prefill out"
            )
        return "decoder", machine.integers.reason
    if asked == "integer":
        return "integer", f"asked for; from {PREFILL_FROM_TOKENS} tokens on"
    expanded = "compiled loops" if machine.compiled else "numpy, as no C compiler was there at installation"
    if asked == "layers":
        return "layers", f"asked for; from {PREFILL_FROM_TOKENS} tokens on, expanded by {expanded}"
    if machine.integers.unit == "":
        return "decoder", machine.integers.reason
    why, spare = machine.integers.reason, machine.available_bytes
    if "prefill" in manifest.parts:
        need = sum(manifest.parts[part].weight_bytes for part in ("decoder", "prefill"))
        if spare is None or spare >= need:
            return "integer", f"{why}; from {PREFILL_FROM_TOKENS} tokens on"
        why = (
            f"decoder and prefill graph take {need / 1e9:.1f} GB, "
            f"{spare / 1e9:.1f} GB of memory are available"
        )
    if "layer" in manifest.parts:
        shortest = LAYERS_FROM_TOKENS[machine.compiled]
        return "layers", f"{why}; prompts from {shortest} tokens on, expanded by {expanded}"
    return "decoder", why
