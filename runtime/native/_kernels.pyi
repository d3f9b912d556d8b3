from typing import Any

import numpy as np
from numpy.typing import NDArray

_Blocks = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None, int, int, int]
_Floats = NDArray[np.float32]
_Count = NDArray[np.int64]

def find_unit() -> int: ...
def room_bytes(rows: int, blocks: int, /) -> int: ...
def packed_size(keys: int, head_dim: int, /) -> int: ...
def multiply(
    unit: int,
    left: NDArray[np.int8],
    row_scales: _Floats,
    rows: int,
    bias: _Floats | None,
    target: _Floats,
    stride: int,
    column: int,
    one: _Blocks,
    two: _Blocks | None,
    next: _Count,
    scratch: NDArray[np.uint8],
    /,
) -> None: ...
def round_rows(
    x: _Floats,
    weight: _Floats | None,
    eps: float,
    width: int,
    first: int,
    count: int,
    tiles: NDArray[np.int8],
    scales: _Floats,
    /,
) -> None: ...
def join_rows(
    stream: _Floats,
    branch: _Floats,
    branch_weight: _Floats,
    weight: _Floats | None,
    eps: float,
    width: int,
    first: int,
    count: int,
    tiles: NDArray[np.int8],
    scales: _Floats,
    /,
) -> None: ...
def rotate_rows(
    x: _Floats,
    stride: int,
    heads: int,
    head_dim: int,
    rotary: int,
    cos: _Floats,
    sin: _Floats,
    first: int,
    count: int,
    /,
) -> None: ...
def pack_keys(
    keys: NDArray[Any],
    values: NDArray[Any],
    stride: int,
    count: int,
    head_dim: int,
    packed: NDArray[np.uint16],
    /,
) -> None: ...
def attend(
    unit: int,
    causal: int,
    queries: _Floats,
    stride: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    keys: int,
    scale: float,
    packed: NDArray[np.uint16],
    target: _Floats,
    next: _Count,
    /,
) -> None: ...
