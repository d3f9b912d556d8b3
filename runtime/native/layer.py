"""One decoder layer on the compiled kernels, from block-quantized weights as they lie in a bundle.

    stream (T, C) ─ norm, bytes ─ q, k, v ─ rotary ─ cache ─ attention ─ bytes ─ o ─ norm ─┬─ + stream
                                                                                          │
    stream (T, C) ◄─ + ◄─ norm ◄─ down ◄─ bytes ◄─ silu(gate) · up ◄─ bytes, norm ◄───────┘

In: the stream of a prompt's tokens, their rotary angles, the layer's buffers of the cache. Out: the stream
after the layer, and the cache with keys and values of these tokens. It computes what `layer.onnx` does
(docs/bundle.md): the same integers, other roundings of floats. Knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError
from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.layerwise.index import AGAIN, LayerForm, LayerWeights, cut_array
from autoglm_edge.runtime.manifest import Geometry

from .crew import Crew
from .unit import Unit, kernels

Floats = NDArray[np.float32]

_STEM = "layer."
_DATA = ".weight_data"
_ROW_TILE, _DEPTH_TILE = 32, 64


@dataclass(frozen=True)
class Widths:
    """Of one layer.

    Attributes:
        hidden: C.
        heads: H.
        kv_heads: K.
        head_dim: D.
        inner: between gate and down.
        form: what the graph knows beside its weights.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    form: LayerForm

    @property
    def attended(self) -> int:
        """Values of all heads."""
        return self.heads * self.head_dim

    @property
    def projected(self) -> int:
        """Values of queries, keys and values together."""
        return self.attended + 2 * self.kv_heads * self.head_dim


class Weights:
    """Views of one layer's weights in the mapped data file; nothing is read."""

    def __init__(self, layer: LayerWeights, data: NDArray[np.uint8]) -> None:
        """Find them.

        Raises:
            BundleError: they are not those of a decoder layer, or lie beyond the end of the file.
        """
        self._matrices = {
            matrix.weight.removeprefix(_STEM).removesuffix(_DATA): matrix.read(data)
            for matrix in layer.matrices
        }
        self._vectors = {
            vector.name.removeprefix(_STEM): cut_array(
                data, vector.offset, (vector.length,), np.float32, vector.name
            )
            for vector in layer.vectors
        }
        slices = sorted(
            (name for name in self._matrices if name.startswith("mlp.gate_up_proj.")),
            key=lambda name: int(name.rpartition(".")[2]),
        )
        half = len(slices) // 2
        self.gated = tuple(
            (self.matrix(gate), self.matrix(up))
            for gate, up in zip(slices[:half], slices[half:], strict=True)
        )
        self.inner = sum(gate.rows for gate, _ in self.gated)

    def matrix(self, name: str) -> Blocks:
        """A matrix by its name in the layer.

        Raises:
            BundleError: there is none.
        """
        found: Blocks = _found(self._matrices, name)
        return found

    def vector(self, name: str) -> Floats:
        """A norm's weight or a bias.

        Raises:
            BundleError: there is none.
        """
        found: Floats = _found(self._vectors, name)
        return found

    def bias(self, name: str) -> Floats | None:
        """The bias of a matrix, if it has one."""
        return self._vectors.get(f"{name}.bias")

    @property
    def blocks(self) -> int:
        """Most blocks of a row."""
        return max(int(matrix.data.shape[1]) for matrix in self._matrices.values())


class Space:
    """Memory for T tokens on their way through a layer, used by one layer after another.

    Attributes:
        stream: (T, C), what layers take and give.
        branch: (T, C).
        projected: (T, queries, keys and values).
        attended: (T, H D).
        inner: (T, inner), where the two before were.
        row_scales: (T,).
    """

    def __init__(self, widths: Widths, tokens: int, keys: int) -> None:
        """Reserve it.

        Args:
            widths: of the layers.
            tokens: T.
            keys: past and new tokens.
        """
        self.stream = np.empty((tokens, widths.hidden), np.float32)
        self.branch = np.empty_like(self.stream)
        wide = np.empty(tokens * max(widths.projected + widths.attended, widths.inner), np.float32)
        split = tokens * widths.projected
        self.projected = wide[:split].reshape(tokens, -1)
        self.attended = wide[split : split + tokens * widths.attended].reshape(tokens, -1)
        self.inner = wide[: tokens * widths.inner].reshape(tokens, -1)
        self.row_scales = np.empty(tokens, np.float32)
        deepest = _padded(max(widths.hidden, widths.attended, widths.inner), _DEPTH_TILE)
        self.tiles = np.empty(_padded(tokens, _ROW_TILE) * deepest, np.int8)
        size = kernels.packed_size(keys, widths.head_dim)
        self.packed = np.empty((widths.kv_heads, size), np.uint16)


def space_bytes(shape: Geometry, inner: int, tokens: int, keys: int) -> int:
    """What a `Space` takes, for forecasts.

    Args:
        shape: of the model.
        inner: between gate and down.
        tokens: of a piece of a prompt.
        keys: of the whole prompt.
    """
    attended, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    floats = 2 * shape.hidden + max(2 * attended + 2 * kv, inner) + 1
    tiles = _padded(tokens, _ROW_TILE) * _padded(max(shape.hidden, attended, inner), _DEPTH_TILE)
    packed = shape.kv_heads * _padded(keys, 128) * _padded(shape.head_dim, 32) * 8  # see attention.c
    return tokens * 4 * floats + tiles + packed


@dataclass(frozen=True, eq=False)
class Layer:
    """The computation; weights, memory and threads come with each call.

    Attributes:
        widths: of the layer.
        unit: what multiplies.
    """

    widths: Widths
    unit: Unit

    def run(
        self,
        weights: Weights,
        space: Space,
        angles: tuple[Floats, Floats],
        cache: tuple[NDArray[Any], NDArray[Any]],
        past: int,
        crew: Crew,
    ) -> Iterator[None]:
        """Take the stream of T tokens through the layer.

        Args:
            weights: of this layer.
            space: its `stream` is read and written.
            angles: cosines and sines, (T, rotary / 2) each.
            cache: keys and values (K, capacity, D), written from `past` on.
            past: P, tokens in the cache before.
            crew: threads.

        Returns:
            Iterator that takes a break between kernels that take long.
        """
        widths, eps = self.widths, self.widths.form.norm_eps
        tokens = len(space.stream)
        self._round(space, space.stream, weights.vector("input_layernorm.weight"), crew)
        column = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            matrix = weights.matrix(f"self_attn.{name}")
            bias = weights.bias(f"self_attn.{name}")
            self._multiply(space, matrix, None, bias, space.projected, column, crew)
            column += matrix.rows
        yield
        self._fill(space, angles, cache, past, crew)
        self._attend(space, cache, past + tokens, crew)
        yield
        self._round(space, space.attended, None, crew)
        self._multiply(space, weights.matrix("self_attn.o_proj"), None, None, space.branch, 0, crew)
        self._join(space, weights, "post_self_attn_layernorm", "post_attention_layernorm", eps, crew)
        column = 0
        for gate, up in weights.gated:
            yield
            self._multiply(space, gate, up, None, space.inner, column, crew)
            column += gate.rows
        yield
        self._round(space, space.inner, None, crew)
        self._multiply(space, weights.matrix("mlp.down_proj"), None, None, space.branch, 0, crew)
        self._join(space, weights, "post_mlp_layernorm", None, eps, crew)
        assert column == widths.inner

    def _round(self, space: Space, x: Floats, weight: Floats | None, crew: Crew) -> None:
        """Rows of x as bytes, normed before if there is a weight."""
        width, eps = x.shape[1], self.widths.form.norm_eps

        def work(first: int, count: int) -> None:
            kernels.round_rows(x, weight, eps, width, first, count, space.tiles, space.row_scales)

        crew.rows("round_rows", work, len(x))

    def _multiply(
        self,
        space: Space,
        one: Blocks,
        two: Blocks | None,
        bias: Floats | None,
        target: Floats,
        column: int,
        crew: Crew,
    ) -> None:
        """The bytes of the space times a matrix, or the gated product of two, into columns of the target."""
        crew.share(
            kernels.multiply,
            int(self.unit),
            space.tiles,
            space.row_scales,
            len(target),
            bias,
            target,
            target.shape[1],
            column,
            _given(one),
            None if two is None else _given(two),
            scratch=True,
        )

    def _fill(
        self,
        space: Space,
        angles: tuple[Floats, Floats],
        cache: tuple[NDArray[Any], NDArray[Any]],
        past: int,
        crew: Crew,
    ) -> None:
        """Turn queries and keys; keys and values into the cache, and all of it packed for attention."""
        widths, tokens = self.widths, len(space.stream)
        heads, size = widths.heads + widths.kv_heads, widths.head_dim

        def turn(first: int, count: int) -> None:
            kernels.rotate_rows(
                space.projected,
                widths.projected,
                heads,  # those of the keys lie behind those of the queries
                size,
                widths.form.rotary_dim,
                *angles,
                first,
                count,
            )

        crew.rows("rotate_rows", turn, tokens)
        fresh = space.projected[:, widths.attended :].reshape(tokens, 2, widths.kv_heads, size)
        for kind, buffer in enumerate(cache):
            buffer[:, past : past + tokens] = fresh[:, kind].swapaxes(0, 1)
        keys, values = cache

        def pack(first: int, count: int) -> None:
            for head in range(first, first + count):
                kernels.pack_keys(keys[head], values[head], size, past + tokens, size, space.packed[head])

        crew.rows("pack_keys", pack, widths.kv_heads)

    def _attend(self, space: Space, cache: tuple[NDArray[Any], NDArray[Any]], keys: int, crew: Crew) -> None:
        widths = self.widths
        crew.share(
            kernels.attend,
            int(self.unit),
            True,
            space.projected,
            widths.projected,
            len(space.stream),
            widths.heads,
            widths.kv_heads,
            widths.head_dim,
            keys,
            widths.head_dim**-0.5,
            space.packed,
            space.attended,
        )

    @staticmethod
    def _join(space: Space, weights: Weights, branch: str, then: str | None, eps: float, crew: Crew) -> None:
        """Stream plus the normed branch; and what follows it as bytes, normed."""
        of_branch = weights.vector(f"{branch}.weight")
        weight = None if then is None else weights.vector(f"{then}.weight")
        width = space.stream.shape[1]

        def work(first: int, count: int) -> None:
            kernels.join_rows(
                space.stream,
                space.branch,
                of_branch,
                weight,
                eps,
                width,
                first,
                count,
                space.tiles,
                space.row_scales,
            )

        crew.rows("join_rows", work, len(space.stream))


def rotary_angles(positions: NDArray[np.int64], form: LayerForm) -> tuple[Floats, Floats]:
    """Cosines and sines of the pairs of a head; pair j turns by position[axis of j] theta ** (-2j / rotary).

    Args:
        positions: (3, T).
        form: says how many pairs each axis has.

    Returns:
        (T, rotary / 2) float32 each.
    """
    exponents = np.arange(0, form.rotary_dim, 2, dtype=np.float32) / form.rotary_dim
    frequencies = (1.0 / form.rope_theta**exponents).astype(np.float32)
    axes = np.repeat(np.arange(len(form.mrope_section)), form.mrope_section)
    angles = np.ascontiguousarray(positions[axes].T, np.float32) * frequencies
    return np.cos(angles), np.sin(angles)


def check_widths(weights: Sequence[Weights], widths: Widths) -> None:
    """Compare the first layer with the widths; all are alike.

    Raises:
        BundleError: they do not fit.
    """
    first, kv = weights[0], widths.kv_heads * widths.head_dim
    wanted = {
        "self_attn.q_proj": (widths.attended, widths.hidden),
        "self_attn.k_proj": (kv, widths.hidden),
        "self_attn.v_proj": (kv, widths.hidden),
        "self_attn.o_proj": (widths.hidden, widths.attended),
        "mlp.down_proj": (widths.hidden, widths.inner),
    }
    for name, shape in wanted.items():
        found = first.matrix(name)
        if (found.rows, found.columns) != shape:
            raise BundleError(f"{name} is {found.rows} x {found.columns}, must be {shape}; {AGAIN}")


def _given(blocks: Blocks) -> tuple[Any, ...]:
    """A matrix as the kernels take it."""
    return (
        blocks.data,
        blocks.scales,
        blocks.zero_points,
        blocks.rows,
        blocks.columns,
        blocks.bits,
    )


def _found(things: dict[str, Any], name: str) -> Any:
    try:
        return things[name]
    except KeyError:
        raise BundleError(f"the layers have no {name}; {AGAIN}") from None


def _padded(value: int, step: int) -> int:
    return -(-value // step) * step
