"""The vision graph: the patches of one picture in, its image tokens out.

    pixel_values    (P, 3 * frames * patch²) float32, merge blocks together
    image_grid_thw  (1, 3) int64: 1, rows, columns of patches
    → image_features (P / merge², C) activations dtype

Positions are computed inside from the grid. Attention over a picture is full, so it goes through one fused
operator whose memory grows with P, not P². Several pictures are several runs. Videos are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn
from onnxscript._internal.builder import OpBuilder

from autoglm_edge.export.source.checkpoint import ModelConfig, VisionConfig
from autoglm_edge.quantize.recipe import PRESETS, Recipe

from .nn import (
    CONTRIB,
    IR_DTYPES,
    LayerNorm,
    Linear,
    Outputs,
    RMSNorm,
    Signature,
    WeightBook,
    build_part,
    constant,
    silu,
)
from .plan import PartPlan, Piece, Weight

STEM = "model.visual"
MERGER_NORM_EPS = 1e-5
"""The merger's LayerNorm keeps torch's default whatever the config says."""
BICUBIC_A = -0.75
"""Coefficient of the cubic convolution kernel that torch's bicubic sampling uses (Keys 1981 has -0.5)."""


class Attention(nn.Module):
    """Every patch of a picture sees every other; positions come in as a two-axis rotary embedding."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        super().__init__()
        self.vision = vision
        self.qkv = Linear(book, f"{stem}.qkv", vision.hidden, 3 * vision.hidden, bias=vision.attention_bias)
        self.proj = Linear(book, f"{stem}.proj", vision.hidden, vision.hidden)

    def forward(self, op: OpBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """(1, P, hidden) -> (1, P, hidden); cos and sin are (1, P, head_dim / 2)."""
        heads = self.vision.heads
        q, k, v = op.Split(self.qkv(op, x), num_outputs=3, axis=-1, _outputs=3)
        q, k = (op.RotaryEmbedding(part, cos, sin, interleaved=0, num_heads=heads) for part in (q, k))
        y = op.MultiHeadAttention(q, k, v, num_heads=heads, scale=self.vision.head_dim**-0.5, **CONTRIB)
        return self.proj(op, y)


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm. The stream is a pair (branch, residual), as in the decoder."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(book, f"{stem}.norm1", vision.hidden, vision.norm_eps)
        self.attn = Attention(book, f"{stem}.attn", vision)
        self.norm2 = RMSNorm(book, f"{stem}.norm2", vision.hidden, vision.norm_eps)
        self.mlp = SwiGlu(book, f"{stem}.mlp", vision.hidden, vision.out_hidden)

    def forward(
        self, op: OpBuilder, branch: ir.Value | None, residual: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """(1, P, hidden) twice -> the same."""
        if branch is None:
            h = self.norm1(op, residual)
        else:
            h, residual = self.norm1(op, branch, residual)
        h, residual = self.norm2(op, self.attn(op, h, cos, sin), residual)
        return self.mlp(op, h), residual


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, book: WeightBook, stem: str, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(book, f"{stem}.gate_proj", width, inner)
        self.up_proj = Linear(book, f"{stem}.up_proj", width, inner)
        self.down_proj = Linear(book, f"{stem}.down_proj", inner, width)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(..., width) -> (..., width)."""
        return self.down_proj(op, op.Mul(silu(op, self.gate_proj(op, x)), self.up_proj(op, x)))


class Merger(SwiGlu):
    """Projection into the decoder's width: linear, LayerNorm, GELU, SwiGLU."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        width = vision.out_hidden
        super().__init__(book, stem, width, vision.merger_intermediate)
        self.proj = Linear(book, f"{stem}.proj", width, width)
        self.post_projection_norm = LayerNorm(book, f"{stem}.post_projection_norm", width, MERGER_NORM_EPS)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """(..., out_hidden) -> (..., out_hidden)."""
        return super().forward(op, op.Gelu(self.post_projection_norm(op, self.proj(op, x))))


class PositionTable(nn.Module):
    """The learned table of side² positions, sampled bicubically at the picture's own grid."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        super().__init__()
        self.side = vision.image_size // vision.patch_size
        self.width = vision.hidden
        piece = Piece(f"{stem}.weight", "float32", (self.side**2, self.width))
        self.weight = book.parameter(piece)
        book.add(Weight(piece.name, self.side**2, self.width, "copy", (piece,)))

    def forward(self, op: OpBuilder, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """rows, columns (1,) int64 -> (rows, columns, width) float32, in reading order.

        Bicubic sampling is separable: A_h (rows, side) and A_w (columns, side) hold each cell's weights, and
        the table is multiplied from both sides.
        """
        along_rows = op.MatMul(
            self._taps(op, rows), op.Reshape(self.weight, [self.side, self.side * self.width])
        )
        cells = op.Reshape(along_rows, [-1, self.side, self.width])  # (rows, side, width)
        return op.MatMul(self._taps(op, columns), cells)

    def _taps(self, op: OpBuilder, count: ir.Value) -> ir.Value:
        """Weights (count, side) of the places (i + 0.5) / count * side - 0.5; the border repeats outwards."""
        side, margin = self.side, 2
        index = op.Cast(op.Range(0, op.Squeeze(count), 1), to=ir.DataType.FLOAT)
        scale = op.Div(float(side), op.Cast(count, to=ir.DataType.FLOAT))
        centre = op.Sub(op.Mul(op.Add(index, 0.5), scale), 0.5)
        knots = constant(op, np.arange(-margin, side + margin, dtype=np.float32))
        distance = op.Abs(op.Sub(op.Unsqueeze(centre, [1]), knots))  # (count, side + 2 margin)
        fold = np.zeros((side + 2 * margin, side), np.float32)  # taps outside the table count for its border
        fold[np.arange(side + 2 * margin), np.clip(np.arange(-margin, side + margin), 0, side - 1)] = 1
        return op.MatMul(_cubic(op, distance), constant(op, fold))


class PatchEmbed(nn.Module):
    """Pixels of a patch, all frames, to its first hidden state: the checkpoint's convolution as a matrix."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        super().__init__()
        self.proj = Linear(book, f"{stem}.proj", patch_width(vision), vision.hidden, bias=True)

    def forward(self, op: OpBuilder, pixels: ir.Value) -> ir.Value:
        """(P, patch) -> (P, hidden)."""
        return self.proj(op, pixels)


class Embeddings(nn.Module):
    """Holds the position table under the checkpoint's name."""

    def __init__(self, book: WeightBook, stem: str, vision: VisionConfig) -> None:
        super().__init__()
        self.position_embedding = PositionTable(book, f"{stem}.position_embedding", vision)

    def forward(self, op: OpBuilder, rows: ir.Value, columns: ir.Value) -> ir.Value:
        """rows, columns (1,) -> (rows, columns, hidden) float32."""
        return self.position_embedding(op, rows, columns)


class Stem(nn.Module):
    """From the patches of a picture to the input of the first block."""

    def __init__(self, book: WeightBook, vision: VisionConfig, name: str = "") -> None:
        super().__init__(name)
        self.vision = vision
        self.patch_embed = PatchEmbed(book, f"{STEM}.patch_embed", vision)
        self.embeddings = Embeddings(book, f"{STEM}.embeddings", vision)
        self.post_conv_layernorm = RMSNorm(
            book, f"{STEM}.post_conv_layernorm", vision.hidden, vision.norm_eps
        )

    def forward(
        self, op: OpBuilder, pixels: ir.Value, grid: ir.Value, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(P, patch), (1, 3) -> (1, P, hidden), and cosines and sines (1, P, head_dim / 2)."""
        vision = self.vision
        rows, columns = (op.Reshape(op.Gather(grid, axis, axis=1), [1]) for axis in (1, 2))
        block_major = _BlockOrder(op, rows, columns, vision.merge_size)
        cos, sin = self._rotary(op, block_major, rows, columns, dtype)
        x = self.post_conv_layernorm(op, self.patch_embed(op, op.Cast(pixels, to=dtype)))
        table = self.embeddings(op, rows, columns)
        places = op.Cast(block_major.cells(op, table, vision.hidden), to=dtype)
        return op.Unsqueeze(op.Add(x, places), [0]), cos, sin

    def _rotary(
        self, op: OpBuilder, order: _BlockOrder, rows: ir.Value, columns: ir.Value, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines (1, P, head_dim / 2): half of the angles by row, the other half by column."""
        spatial = self.vision.head_dim // 2
        frequencies = 1.0 / self.vision.rope_theta ** (np.arange(0, spatial, 2, dtype=np.float32) / spatial)
        own = constant(op, frequencies.astype(np.float32))
        by_row, by_column = op.Range(0, op.Squeeze(rows), 1), op.Range(0, op.Squeeze(columns), 1)
        shape = op.Concat(rows, columns, axis=0)
        grids = (op.Expand(op.Unsqueeze(by_row, [1]), shape), op.Expand(by_column, shape))
        angles = [
            op.Mul(op.Cast(order.cells(op, grid, 1), to=ir.DataType.FLOAT), own) for grid in grids
        ]  # (P, head_dim / 4) each
        angle = op.Unsqueeze(op.Concat(*angles, axis=-1), [0])
        return op.Cast(op.Cos(angle), to=dtype), op.Cast(op.Sin(angle), to=dtype)


class Top(nn.Module):
    """From the output of the last block to image tokens."""

    def __init__(self, book: WeightBook, vision: VisionConfig, name: str = "") -> None:
        super().__init__(name)
        merge = vision.merge_size
        self.width = merge * merge * vision.hidden
        self.post_layernorm = RMSNorm(book, f"{STEM}.post_layernorm", vision.hidden, vision.norm_eps)
        self.downsample = Linear(
            book,
            f"{STEM}.downsample",
            self.width,
            vision.out_hidden,
            bias=True,
            permute=(0, 2, 3, 1),  # a block's patches lie one after another, channels last
        )
        self.merger = Merger(book, f"{STEM}.merger", vision)

    def forward(self, op: OpBuilder, branch: ir.Value | None, residual: ir.Value) -> ir.Value:
        """(1, P, hidden) twice -> (P / merge², out_hidden)."""
        if branch is None:
            h = self.post_layernorm(op, residual)
        else:
            h, _ = self.post_layernorm(op, branch, residual)
        return self.merger(op, self.downsample(op, op.Reshape(h, [-1, self.width])))


class Visual(nn.Module):
    """The whole tower, under the checkpoint's name. Stem and top have no names of their own there."""

    def __init__(self, book: WeightBook, vision: VisionConfig) -> None:
        super().__init__(STEM)
        self.stem = Stem(book, vision)
        self.blocks = nn.ModuleList([Block(book, f"{STEM}.blocks.{i}", vision) for i in range(vision.depth)])
        self.top = Top(book, vision)

    def forward(self, op: OpBuilder, pixels: ir.Value, grid: ir.Value, dtype: ir.DataType) -> ir.Value:
        """(P, patch), (1, 3) -> (P / merge², out_hidden)."""
        residual, cos, sin = self.stem(op, pixels, grid, dtype)
        branch = None
        for block in self.blocks:
            branch, residual = block(op, branch, residual, cos, sin)
        return self.top(op, branch, residual)


class _BlockOrder:
    """Reorders a (rows, columns, ...) grid so that the patches of a merge block follow one another."""

    def __init__(self, op: OpBuilder, rows: ir.Value, columns: ir.Value, merge: int) -> None:
        self._shape = op.Concat(
            op.Div(rows, [merge]), [merge], op.Div(columns, [merge]), [merge], [-1], axis=0
        )

    def cells(self, op: OpBuilder, grid: ir.Value, width: int) -> ir.Value:
        """(rows, columns[, width]) -> (P, width)."""
        blocks = op.Transpose(op.Reshape(grid, self._shape), perm=[0, 2, 1, 3, 4])
        return op.Reshape(blocks, [-1, width])


def _cubic(op: OpBuilder, distance: ir.Value) -> ir.Value:
    """Cubic convolution kernel of |distance|, 0 beyond 2 (R. Keys, 1981, with a = -0.75)."""
    a = BICUBIC_A
    square = op.Mul(distance, distance)
    cube = op.Mul(square, distance)
    near = op.Add(op.Sub(op.Mul(cube, a + 2), op.Mul(square, a + 3)), 1.0)
    far = op.Sub(op.Add(op.Sub(op.Mul(cube, a), op.Mul(square, 5 * a)), op.Mul(distance, 8 * a)), 4 * a)
    return op.Where(op.LessOrEqual(distance, 1.0), near, op.Where(op.Less(distance, 2.0), far, 0.0))


def patch_width(vision: VisionConfig) -> int:
    """Values of one patch: channels, frames, rows and columns."""
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2


def plan_vision(config: ModelConfig, recipe: Recipe) -> PartPlan:
    """Graph and weight plan of the vision tower."""
    vision = config.vision
    book = WeightBook(recipe)
    visual = Visual(book, vision)
    dtype = IR_DTYPES[book.dtype]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        features = visual(op, *values, dtype)
        return [("image_features", features, dtype, ["image_tokens", vision.out_hidden])]

    return build_part("vision", book, _inputs(vision), trace)


def plan_stem(config: ModelConfig) -> PartPlan:
    """The stem by itself, in float32: the inputs of the vision graph → x (1, P, hidden), cos, sin."""
    vision, dtype = config.vision, ir.DataType.FLOAT
    book = WeightBook(PRESETS["fp32"])
    stem = Stem(book, vision, STEM)

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        x, cos, sin = stem(op, *values, dtype)
        rotary: Sequence[int | str] = [1, "patches", vision.head_dim // 2]
        return [
            ("x", x, dtype, [1, "patches", vision.hidden]),
            ("cos", cos, dtype, rotary),
            ("sin", sin, dtype, rotary),
        ]

    return build_part("stem", book, _inputs(vision), trace)


def plan_block(config: ModelConfig) -> PartPlan:
    """One block by itself, in float32, with weights called `block.*`: x, cos, sin → y (1, P, hidden)."""
    vision, dtype = config.vision, ir.DataType.FLOAT
    book = WeightBook(PRESETS["fp32"])
    block = Block(book, "block", vision)
    block._set_name("block")
    shape: Sequence[int | str] = [1, "patches", vision.hidden]
    rotary: Sequence[int | str] = [1, "patches", vision.head_dim // 2]

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        branch, residual = block(op, None, *values)
        return [("y", op.Add(branch, residual), dtype, shape)]

    return build_part(
        "block", book, [("x", dtype, shape), ("cos", dtype, rotary), ("sin", dtype, rotary)], trace
    )


def plan_top(config: ModelConfig) -> PartPlan:
    """The top by itself, in float32: x (1, P, hidden) → image_features (N, C)."""
    vision, dtype = config.vision, ir.DataType.FLOAT
    book = WeightBook(PRESETS["fp32"])
    top = Top(book, vision, STEM)

    def trace(builder: GraphBuilder, op: OpBuilder, values: list[ir.Value]) -> Outputs:
        return [("image_features", top(op, None, *values), dtype, ["image_tokens", vision.out_hidden])]

    return build_part("top", book, [("x", dtype, [1, "patches", vision.hidden])], trace)


def _inputs(vision: VisionConfig) -> Signature:
    return [
        ("pixel_values", ir.DataType.FLOAT, ["patches", patch_width(vision)]),
        ("image_grid_thw", ir.DataType.INT64, [1, 3]),
    ]
