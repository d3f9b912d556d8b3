"""Block-quantized number formats: how integers, scales and zero points lie, and what they mean.

In: the bytes that onnxruntime's MatMulNBits and GatherBlockQuantized read. Out: float32 rows (N, K). Knows
nothing of tensor names, files or graphs, nor how integers are chosen, and needs numpy only.

Along K, `block_size` neighbours share a scale, and unless the format is symmetric a zero point. A stored
integer q stands for (q - zero_point) * scale. Layout, specified with an example in docs/bundle.md:

    data         uint8 (N, blocks, block_size * field_bits / 8)   4 bits: the earlier weight in the low nibble
    scales       float (N, blocks)
    zero points  uint8 (N, ceil(blocks * field_bits / 8))         4 bits: the earlier block in the low nibble

A field has 4 or 8 bits, which is what the kernels of every onnxruntime read. Integers of 2 and 3 bits, which
exist to show what too few bits do, lie in 4-bit fields and save nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import QuantError

ScaleDtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class BlockFormat:
    """Integers of a few bits; `block_size` neighbours along the input dimension share a scale.

    Attributes:
        bits: 2, 3, 4 or 8.
        block_size: 32, 64 or 128.
        symmetric: no zero points stored; the middle of the field, 8 or 128, means 0.0.
    """

    bits: int
    block_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise QuantError(f"bits is {self.bits}, must be 2, 3, 4 or 8")
        if self.block_size not in (32, 64, 128):
            raise QuantError(f"block size is {self.block_size}, must be 32, 64 or 128")

    @property
    def field_bits(self) -> int:
        """Bits that an integer takes up when stored, 4 or 8; what the kernels are told."""
        return 8 if self.bits == 8 else 4

    @property
    def block_bytes(self) -> int:
        """Bytes of the packed integers of one block."""
        return self.block_size * self.field_bits // 8

    @property
    def middle(self) -> int:
        """The integer that means 0.0 in a symmetric format: the zero point that kernels assume, 8 or 128."""
        return 1 << (self.field_bits - 1)

    @property
    def lowest(self) -> int:
        """The smallest integer stored."""
        return self.middle - (1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The largest integer stored: `lowest` + 2 ** bits - 1."""
        return self.lowest + (1 << self.bits) - 1

    def blocks(self, columns: int) -> int:
        """Blocks in a row of `columns` weights; the last one may be padded."""
        return -(-columns // self.block_size)

    def zero_point_bytes(self, columns: int) -> int:
        """Bytes of packed zero points of a row of `columns` weights; 0 if symmetric."""
        return 0 if self.symmetric else -(-self.blocks(columns) * self.field_bits // 8)

    def size_bytes(self, rows: int, columns: int, scale_bytes: int = 4) -> int:
        """Bytes of all that is stored of a (rows, columns) matrix, with scales of `scale_bytes` each."""
        blocks = self.blocks(columns)
        return rows * (blocks * (self.block_bytes + scale_bytes) + self.zero_point_bytes(columns))


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized matrix, as stored.

    Attributes:
        data: uint8 (N, blocks, block_bytes), packed integers.
        scales: float32 or float16 (N, blocks).
        zero_points: uint8 (N, zero_point_bytes), packed; None if the format is symmetric.
    """

    data: NDArray[np.uint8]
    scales: NDArray[np.floating[Any]]
    zero_points: NDArray[np.uint8] | None


def dequantize_rows(quantized: Quantized, fmt: BlockFormat, columns: int) -> NDArray[np.float32]:
    """Turn a packed matrix back into floats: (integer - zero point) * scale, in float32.

    Args:
        quantized: N rows in the layout of this module.
        fmt: the format it is in.
        columns: K, of the matrix before padding.

    Returns:
        float32 (N, K).

    Raises:
        QuantError: the arrays do not have the shapes that the format gives for K columns.
    """
    count, blocks = len(quantized.data), fmt.blocks(columns)
    _check(quantized, fmt, columns)
    if fmt.field_bits == 4:
        integers = unpack_nibbles(quantized.data.reshape(count, -1))
    else:
        integers = quantized.data.reshape(count, -1)
    floats = integers.reshape(count, blocks, fmt.block_size).astype(np.float32)
    if quantized.zero_points is None:
        floats -= np.float32(fmt.middle)
    else:
        zeros = quantized.zero_points
        if fmt.field_bits == 4:
            zeros = unpack_nibbles(zeros)[:, :blocks]
        floats -= zeros[..., None].astype(np.float32)
    floats *= quantized.scales[..., None].astype(np.float32)
    return np.ascontiguousarray(floats.reshape(count, -1)[:, :columns])


def pack_nibbles(integers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack integers 0..15 along the last axis, the earlier in the low nibble; an odd end is filled with 0.

    Args:
        integers: uint8 (..., n).

    Returns:
        uint8 (..., ceil(n / 2)).
    """
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], axis=-1)
    packed: NDArray[np.uint8] = integers[..., 0::2] | (integers[..., 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The reverse of pack_nibbles: uint8 (..., n) to integers 0..15, uint8 (..., 2 * n)."""
    integers = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    np.bitwise_and(packed, np.uint8(15), out=integers[..., 0::2])
    np.right_shift(packed, np.uint8(4), out=integers[..., 1::2])
    return integers


def _check(quantized: Quantized, fmt: BlockFormat, columns: int) -> None:
    count, blocks = len(quantized.data), fmt.blocks(columns)
    wanted = {"data": (count, blocks, fmt.block_bytes), "scales": (count, blocks)}
    if not fmt.symmetric:
        wanted["zero_points"] = (count, fmt.zero_point_bytes(columns))
    for name, shape in wanted.items():
        array = getattr(quantized, name)
        if array is None or array.shape != shape:
            seen = "absent" if array is None else f"of shape {array.shape}"
            raise QuantError(f"quantized {name} is {seen}, must be {shape} for {columns} columns in {fmt}")
    if fmt.symmetric and quantized.zero_points is not None:
        raise QuantError(f"quantized weights have zero points, but {fmt} is symmetric")
