"""What a bundle needs in memory while it answers, by item and phase, from the runtime's own formulas.

In: a bundle, how it would be run, and the size of a question. Out: `Need`: items in bytes, anonymous or
mapped, with the phases that hold them. Runs nothing, and reads nothing but the manifest, the index of layers,
the widths in config.json and the names in the decoder's graph.

What the manifest gives exactly: bytes of weights by part, bytes of the cache per token, shapes of the layers.
What had to be measured stands below as constants, each with the run that gave it: how much an allocator holds
beyond what is alive, and what an interpreter with its libraries takes. benchmarks/simulator.py compares the
sums with measured runs.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from autoglm_edge.errors import SimulationError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.layerwise.index import LayerWeights, read_index
from autoglm_edge.runtime.manifest import Manifest
from autoglm_edge.runtime.native.space import space_bytes
from autoglm_edge.runtime.plan import PREFILL_CHUNK, ModelPlan, is_integer

_SLICES = re.compile(rb"lm_head\.(\d+)\.weight")
"""How the graph names the slices of a head (docs/bundle.md)."""

READERS = {"layers": "layer", "integer": "prefill", "native": ""}
"""The graph that reads prompts, if one does, by what the plan says."""
PHASES = ("load", "image", "prefill", "decode")
Memory = Literal["anonymous", "mapped"]

INTERPRETER_BYTES = 30_000_000
"""Anonymous memory of Python with the runtime imported (CPython 3.11, numpy 2.4, onnxruntime 1.31)."""
LIBRARY_BYTES = 45_000_000
"""Pages of their files that stay resident."""
TOKENIZER_GROWTH = 11.0
"""Memory of a tokenizer per byte of tokenizer.json: 98 MB for one of 8.8 MB with 145,000 ids."""
SESSION_BYTES = 300_000
GRAPH_GROWTH = 30.0
"""A session, and what it holds per byte of its graph file: 20 MB for embedding and decoder of 40 layers."""
PACKED = 1.09
"""Bytes of packed blocks per byte of the bundle's: 5.77 GB of 5.30 GB at the 9B's shape."""
PACKING = 1.25
"""Memory while a matrix is packed, compared and dropped, per byte of it: 0.79 GB for a head of 0.64 GB."""
LIVE_ROWS = (4, 5)
"""Widths that are alive in a layer at once: of the MLP (gate, up, activated, product), of the stream."""
ARENA = 1.6
"""What onnxruntime's arena takes per byte that is alive: 244 MB for 154 MB at the 9B's shape, 512 tokens."""
INTEGER_ARENA = 2.4
"""The same for graphs of 8-bit products, which hold quantized copies and sums as well."""
STREAMS = 6
"""Hidden states of a whole piece when it is read layer by layer: in, out and embedded, and three copies in
the arena of the embedding."""
KEPT = 0.25
"""Share of the activations of a prompt, and of decoded pictures, that allocators do not give back afterwards.
Those of the vision tower are given back."""
VISION_ROWS = (4, 2)
"""As LIVE_ROWS, of a block of the vision tower; ARENA_VISION as ARENA (97 kB per patch at the 9B's shape)."""
ARENA_VISION = 1.1
PICTURE_COPIES = 2
"""Pictures of the source's size that are there at once while it is decoded, turned upright and resized."""
BOOKKEEPING_BYTES = 1_000
"""Ids, positions and keys of a token of the prompt."""
SAMPLING_ROWS = 6
"""Rows of logits in float32 that decoding holds."""
SCREEN = (1080, 2400)
"""Width and height of the screenshot that is meant where no picture is named."""


@dataclass(frozen=True)
class Question:
    """The size of what is asked.

    Attributes:
        prompt_tokens: image tokens included.
        image_tokens: of all pictures.
        answer_tokens: that follow.
        source_pixels: of the largest picture before it is resized.
    """

    prompt_tokens: int
    image_tokens: int = 0
    answer_tokens: int = 128
    source_pixels: int = SCREEN[0] * SCREEN[1]

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.answer_tokens < 0 or self.source_pixels < 0:
            raise SimulationError(
                f"a question of {self.prompt_tokens} tokens with an answer of {self.answer_tokens} is not "
                "possible; give 1 or more"
            )
        if not 0 <= self.image_tokens <= self.prompt_tokens:
            raise SimulationError(
                f"{self.image_tokens} image tokens are more than the {self.prompt_tokens} tokens of the "
                "prompt; give a longer prompt or a smaller picture"
            )

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Item:
    """Something that takes memory.

    Attributes:
        name: of it.
        memory: what kind.
        phases: that hold it.
        bytes: how much.
        swept: mapped, and read from one end to the other again and again in these phases: all of it must
            stay resident, or all of it is read anew each time.
    """

    name: str
    memory: Memory
    phases: tuple[str, ...]
    bytes: int
    swept: bool = False


@dataclass(frozen=True)
class Need:
    """All items of a question.

    Attributes:
        items: in the order of a run.
        notes: what had to be guessed, a sentence each.
    """

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    def anonymous(self, phase: str) -> int:
        """Anonymous bytes at the peak of a phase."""
        return self._sum("anonymous", phase)

    def mapped(self, phase: str) -> int:
        """Mapped bytes that are resident in a phase if nothing had to be dropped."""
        return self._sum("mapped", phase)

    def swept(self, phase: str) -> int:
        """Mapped bytes that a phase reads again and again."""
        return sum(item.bytes for item in self.items if item.swept and phase in item.phases)

    @property
    def peak(self) -> int:
        """Most anonymous bytes of any phase."""
        return max(map(self.anonymous, PHASES))

    @property
    def peak_phase(self) -> str:
        """Where that is."""
        return max(PHASES, key=self.anonymous)

    def _sum(self, memory: Memory, phase: str) -> int:
        return sum(item.bytes for item in self.items if item.memory == memory and phase in item.phases)


@dataclass(frozen=True)
class Widths:
    """Sizes inside the graphs that the manifest does not tell.

    Attributes:
        intermediate: of the decoder's MLP.
        vision_hidden: of the tower's stream.
        vision_intermediate: of its MLP.
        merger: width of the MLP that makes tokens of patches.
        expanded_bytes: of one layer in 8 bits.
        largest_bytes: of the decoder's largest matrix, as stored; of two, if as large a one follows, as the
            slices of a head do: one is still there while the next is packed.
        notes: what was guessed.
    """

    intermediate: int
    vision_hidden: int
    vision_intermediate: int
    merger: int
    expanded_bytes: int
    largest_bytes: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle) -> Widths:
        """From the index of layers where there is one, else from config.json, else by the usual ratios.

        Raises:
            BundleError: the index of layers is damaged.
        """
        manifest = bundle.manifest
        shape, notes = manifest.geometry, []
        config = _config(bundle)
        text, vision = config.get("text_config", {}), config.get("vision_config", {})
        intermediate = _whole(text, "intermediate_size")
        if not intermediate:
            intermediate = round(3.34 * shape.hidden)
            notes.append(f"config.json does not tell the width of the MLP, {intermediate} is assumed")
        vision_hidden = _whole(vision, "hidden_size")
        if not vision_hidden:
            vision_hidden = round(0.375 * shape.hidden)
            notes.append(f"config.json does not tell the width of the vision tower, {vision_hidden} assumed")
        attention = shape.hidden * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        layer = attention + 3 * shape.hidden * intermediate
        weight_bytes = manifest.parts["decoder"].weight_bytes
        head = shape.vocab * shape.hidden
        largest = round(weight_bytes * head / (head + shape.layers * layer))
        matrix = round(weight_bytes * 2 * intermediate * shape.hidden / (head + shape.layers * layer))
        expanded = layer
        if "layer" in manifest.parts:
            index = read_index(bundle.file(manifest.parts["layer"].data), shape.layers).layers
            expanded = sum(
                math.prod(size) * (4 if len(size) == 1 else 1) for size in index[0].shapes.values()
            )
            largest = max(0, weight_bytes - sum(map(_stored, index)))  # with the last norm, a few kB
        graph = bundle.file(manifest.parts["decoder"].graph).read_bytes()
        if slices := len(set(_SLICES.findall(graph))):
            largest = 2 * max(largest // slices, matrix)
        return cls(
            intermediate,
            vision_hidden,
            _whole(vision, "out_hidden_size") or shape.hidden,
            _whole(vision, "intermediate_size") or intermediate,
            expanded,
            min(weight_bytes, largest),
            tuple(notes),
        )


def need(bundle: Bundle, plan: ModelPlan, question: Question, widths: Widths | None = None) -> Need:
    """Add up what a question needs.

    Args:
        bundle: opened.
        plan: how it would be run (`runtime.plan.plan_model`).
        question: its size.
        widths: of the bundle, if they are known already.

    Raises:
        BundleError: the index of layers is damaged.
    """
    sizes = widths or Widths.of(bundle)
    reader = "" if _by_decoder(plan, question) else READERS[plan.prefill]
    program = _program(bundle, pictures=question.image_tokens > 0, reader=reader)
    items = [*program, *_weights(bundle.manifest, plan, sizes)]
    if question.image_tokens:
        items += _picture(bundle.manifest, plan, question, sizes)
    items += _prompt(bundle.manifest, plan, question, sizes)
    return Need(tuple(item for item in items if item.bytes > 0), sizes.notes)


def _program(bundle: Bundle, *, pictures: bool, reader: str) -> list[Item]:
    """Interpreter, tokenizer and the graphs without their weights; `reader` is the one for prompts."""
    files = {entry.path: entry.size_bytes for entry in bundle.manifest.files}

    def graphs(*names: str) -> int:
        parts = [bundle.manifest.parts[name] for name in names if name in bundle.manifest.parts]
        return sum(SESSION_BYTES + round(GRAPH_GROWTH * files.get(part.graph, 0)) for part in parts)

    return [
        Item("interpreter and libraries", "anonymous", PHASES, INTERPRETER_BYTES),
        Item("tokenizer", "anonymous", PHASES, round(TOKENIZER_GROWTH * files.get("tokenizer.json", 0))),
        Item("graphs", "anonymous", PHASES, graphs("embedding", "decoder")),
        *([Item("graphs", "anonymous", PHASES[1:], graphs("vision"))] if pictures else []),
        *([Item("graphs", "anonymous", PHASES[2:], graphs(reader))] if reader else []),
        Item("libraries", "mapped", PHASES, LIBRARY_BYTES),
    ]


def _weights(manifest: Manifest, plan: ModelPlan, sizes: Widths) -> list[Item]:
    """Decoder and embedding, where the plan has them."""
    stored = manifest.parts["decoder"].weight_bytes
    ready = _packed(manifest, "decoder")
    steady = ("prefill", "decode")
    items = [Item("embedding table", "mapped", PHASES, manifest.parts["embedding"].weight_bytes)]
    if plan.weights == "packed":
        items += [
            Item("decoder weights, packed", "anonymous", PHASES, ready),
            Item("decoder weights, read", "mapped", ("load",), stored),
        ]
    elif plan.weights == "prepared":
        items += [
            Item(
                "largest matrix while packing", "anonymous", ("load",), round(PACKING * sizes.largest_bytes)
            ),
            Item("decoder weights, read", "mapped", ("load",), stored),
            Item("decoder weights, prepared", "mapped", steady, ready, swept=True),
        ]
    else:
        items.append(Item("decoder weights", "mapped", steady, stored, swept=True))
    return items


def _picture(manifest: Manifest, plan: ModelPlan, question: Question, sizes: Widths) -> list[Item]:
    """Decoding, resizing and encoding; features stay until the prompt is read and longer."""
    image, shape = manifest.image, manifest.geometry
    patches = question.image_tokens * image.merge_size**2
    row = 4 * (VISION_ROWS[0] * sizes.vision_intermediate + VISION_ROWS[1] * sizes.vision_hidden)
    source = PICTURE_COPIES * 3 * question.source_pixels + patches * 3 * image.patch_size**2
    live = round(ARENA_VISION * patches * row)
    vision = manifest.parts["vision"].weight_bytes
    integer = is_integer(manifest, "vision")
    later = ("image", "prefill", "decode")
    items = [
        Item("pictures, decoded and cut", "anonymous", ("image",), source),
        Item("patches as numbers", "anonymous", ("image",), 4 * patches * image.patch_dim),
        Item("activations of a picture", "anonymous", ("image",), live),
        Item("kept by allocators", "anonymous", ("prefill", "decode"), round(KEPT * source)),
        Item("image features", "anonymous", later, 4 * question.image_tokens * shape.hidden),
    ]
    if plan.widened or (not integer and plan.weights != "prepared"):
        items.append(Item("vision weights, packed", "anonymous", later, _packed(manifest, "vision")))
    else:
        grown = vision
        if plan.weights == "prepared":
            grown = _packed(manifest, "vision")
            # Packed, compared and dropped before there are activations: the larger of both counts.
            largest = min(vision, 2 * sizes.merger * shape.hidden)
            matrix = max(0, round(PACKING * largest) - live - 4 * patches * image.patch_dim)
            items.append(Item("largest matrix while packing", "anonymous", ("image",), matrix))
        items.append(Item("vision weights", "mapped", later, grown))
    return items


def _prompt(manifest: Manifest, plan: ModelPlan, question: Question, sizes: Widths) -> list[Item]:
    """The cache, what reading the prompt takes, and what decoding holds."""
    shape, tokens = manifest.geometry, question.prompt_tokens
    strips = 4096 * shape.layers * 2 * shape.kv_heads  # each begins a page that it shares with none
    row = 4 * (LIVE_ROWS[0] * sizes.intermediate + LIVE_ROWS[1] * shape.hidden)
    by_decoder = _by_decoder(plan, question)
    arena = ARENA if by_decoder else INTEGER_ARENA
    activations = round(arena * min(tokens, PREFILL_CHUNK) * row)
    expanded = streams = 0
    if not by_decoder and plan.prefill == "layers":
        expanded = sizes.expanded_bytes
        streams = STREAMS * min(tokens, plan.prefill_chunk) * 4 * shape.hidden
    if not by_decoder and plan.prefill == "native":
        activations = space_bytes(shape, sizes.intermediate, min(tokens, plan.prefill_chunk), tokens)
    cache = manifest.kv_bytes_per_token
    items = [
        Item("keys and values", "anonymous", ("prefill",), strips + cache * tokens),
        Item("keys and values", "anonymous", ("decode",), strips + cache * question.tokens),
        Item("activations of a prompt", "anonymous", ("prefill",), activations),
        Item("one layer in 8 bits", "anonymous", ("prefill",), expanded),
        Item("hidden states of a prompt", "anonymous", ("prefill",), streams),
        Item("kept by allocators", "anonymous", ("decode",), round(KEPT * (activations + expanded))),
        Item("ids and positions", "anonymous", ("prefill", "decode"), BOOKKEEPING_BYTES * question.tokens),
        Item("scores of the vocabulary", "anonymous", ("decode",), SAMPLING_ROWS * 4 * shape.vocab),
    ]
    if not by_decoder and plan.prefill == "integer" and "prefill" in manifest.parts:
        weights = manifest.parts["prefill"].weight_bytes
        items += [
            Item("prefill graph", "mapped", ("prefill",), weights, swept=True),
            Item("prefill graph", "mapped", ("decode",), weights),
        ]
    elif not by_decoder and plan.takes_breaks and plan.weights != "mapped":  # else they are counted already
        stored = manifest.parts["decoder"].weight_bytes
        items.append(Item("decoder weights, expanded from", "mapped", ("prefill", "decode"), stored))
    return items


def _packed(manifest: Manifest, part: str) -> int:
    """Bytes of a part's weights in the layout of the kernels; integers of whole channels stay as long."""
    stored = manifest.parts[part].weight_bytes
    return stored if is_integer(manifest, part) else round(PACKED * stored)


def _stored(layer: LayerWeights) -> int:
    """Bytes of a layer in the bundle: fields, scales, zero points, norms and biases."""
    found = sum(4 * vector.length for vector in layer.vectors)
    for item in layer.matrices:
        found += item.rows * item.blocks * (item.block_size * item.bits // 8 + 4)
        if item.zero_points_offset >= 0:
            found += item.rows * -(-item.blocks * item.bits // 8)
    return found


def _by_decoder(plan: ModelPlan, question: Question) -> bool:
    """Whether the prompt goes through the decoder, all but its last token being fewer than pay otherwise."""
    return plan.prefill == "decoder" or question.prompt_tokens - 1 < plan.prompt_from


def _config(bundle: Bundle) -> dict[str, Any]:
    """config.json of the checkpoint; empty if it is not there or not readable: it only refines."""
    try:
        found = json.loads((bundle.path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, dict)}


def _whole(table: dict[str, Any], name: str) -> int:
    """A positive integer of a foreign table, else 0."""
    value = table.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24 else 0
