"""One decoder layer on the compiled kernels, from block-quantized weights as they lie in a bundle.

    stream (T, C) ─ norm, bytes ─ q, k, v ─ rotary ─ cache ─ attention ─ bytes ─ o ─ norm ─┬─ + stream
                                                                                          │
    stream (T, C) ◄─ + ◄─ norm ◄─ down ◄─ bytes ◄─ silu(gate) · up ◄─ bytes, norm ◄───────┘

In: the stream of a prompt's tokens, their rotary angles, the layer's buffers of the cache. Out: the stream
after the layer, and the cache with keys and values of these tokens. It computes what `layer.onnx` does
(docs/bundle.md): the same integers, other roundings of floats. Knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.layerwise.index import LayerForm

from .crew import Crew
from .space import Space
from .unit import Unit, kernels
from .weights import Floats, Weights, Widths


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
