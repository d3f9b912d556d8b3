"""Random weights for the checkpoints that make_checkpoint.py writes: values, and the files that hold them.

In: a shape, a seed, a number format. Out: safetensors files. The values depend on the seed and the tensor
name alone. One chunk of one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from checkpoint_shapes import Shape, tensor_shapes
from checkpoint_tokenizer import write_json
from numpy.typing import NDArray

Dtype = Literal["bfloat16", "float16", "float32"]

DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
    "float32": ("F32", np.dtype(np.float32)),
}
"""Name in config.json -> name in a safetensors header, numpy type."""
POOL_VALUES = 4_194_301
"""Length of the pool that large tensors are cut from: a prime, so rows of one tensor do not line up."""


def write_weights(
    folder: Path, shape: Shape, *, seed: int, dtype: Dtype, shards: int, shard_bytes: int | None
) -> None:
    """Write one file, or shards and their index."""
    code, kind = DTYPES[dtype]
    tensors = tensor_shapes(shape)
    sizes = {name: math.prod(dims) * kind.itemsize for name, dims in tensors.items()}
    groups = group(sizes, shards=shards, shard_bytes=shard_bytes)
    files = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    )
    for file, names in zip(files, groups, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {
                "dtype": code,
                "shape": list(tensors[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                for chunk in values_of(name, tensors[name], seed=seed, kind=kind, tied=shape.tied_head):
                    stream.write(chunk.view(np.uint8).data)
    if len(groups) > 1:
        weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / "model.safetensors.index.json", index)


def group(sizes: Mapping[str, int], *, shards: int, shard_bytes: int | None) -> list[list[str]]:
    """Cut the tensors, in order, into files."""
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"shards is {shards}, must be from 1 to {len(sizes)}, the number of tensors")
    limit = math.ceil(sum(sizes.values()) / shards) if shard_bytes is None else shard_bytes
    groups: list[list[str]] = [[]]
    filled = 0
    for number, (name, size) in enumerate(sizes.items()):
        full = filled + size > limit
        if shard_bytes is None:  # exactly `shards` files: neither one more, nor too few tensors for the rest
            to_come = shards - len(groups)
            full = to_come > 0 and (full or len(sizes) - number <= to_come)
        if groups[-1] and full:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def values_of(
    name: str, dims: tuple[int, ...], *, seed: int, kind: np.dtype[Any], tied: bool
) -> Iterator[NDArray[Any]]:
    """The values of one tensor as flat pieces, in order."""
    mean, std = _moments(name, dims, tied=tied)
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    count = math.prod(dims)
    if count <= POOL_VALUES:
        values = rng.standard_normal(count, dtype=np.float32)
        yield (values * np.float32(std) + np.float32(mean)).astype(kind)
        return
    pool = (_pool(seed) * np.float32(std) + np.float32(mean)).astype(kind)
    while count > 0:
        start = int(rng.integers(POOL_VALUES))
        for piece in (pool[start:], pool[:start]):
            yield piece[:count]
            count -= len(piece[:count])


@cache
def _pool(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(POOL_VALUES, dtype=np.float32)


def _moments(name: str, dims: tuple[int, ...], *, tied: bool) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith(".bias"):
        return 0.0, 0.05
    if len(dims) == 1:
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, dims[1] ** -0.5 if tied else 1.0
    if name.endswith("position_embedding.weight"):
        return 0.0, 0.5
    return 0.0, math.prod(dims[1:]) ** -0.5
