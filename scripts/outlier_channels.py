#!/usr/bin/env python3
"""Outlier channels as large models have them, put into a checkpoint that goes on computing the same.

In: a checkpoint folder. Out: another, in float32, in which a few channels of every activation that enters a
matrix are `--scale` times as large, and the columns that read them as much smaller. Norm weights scale the
inputs of queries, keys, values, gate, up and head; rows of the up matrix scale the input of down. Products
are the same, but for rounding of float32; what rounds weights or activations block by block has a harder
time.

The links are written down here once more, and not taken from the export, which balances such channels: what
it forgets is found.

    scripts/outlier_channels.py --scale 100 -o /tmp/outliers                 # of the pocket model
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 once this is imported
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from autoglm_edge.embedded import pocket_path

Tensors = dict[str, NDArray[np.float32]]

CHANNELS_PER_OUTLIER = 32
"""One channel of so many is made an outlier, at least one."""
LAYERS, BLOCKS = "model.language_model.layers.", "model.visual.blocks."


@dataclass(frozen=True)
class Link:
    """A place where channels can be scaled up, and the matrices where they must be scaled down.

    Attributes:
        source: a norm's weight (C,), or a matrix whose rows make the channels.
        rows: those rows; for a norm all.
        readers: matrices (N, C) that read the channels, and all that do.
    """

    source: str
    rows: slice
    readers: tuple[str, ...]


def links(tensors: Mapping[str, NDArray[np.float32]]) -> Iterator[Link]:
    """Every place of the decoder and the vision tower where it can be done exactly.

    The weight of the last norm of the vision tower is left out, as a convolution reads it.
    """
    everything = slice(0, None)
    for number in range(_count(tensors, LAYERS)):
        stem = f"{LAYERS}{number}"
        heads = tuple(f"{stem}.self_attn.{name}_proj.weight" for name in "qkv")
        gate_up, down = f"{stem}.mlp.gate_up_proj.weight", f"{stem}.mlp.down_proj.weight"
        yield Link(f"{stem}.input_layernorm.weight", everything, heads)
        yield Link(f"{stem}.post_attention_layernorm.weight", everything, (gate_up,))
        half = len(tensors[gate_up]) // 2  # gate first; SwiGLU is linear in up alone
        yield Link(gate_up, slice(half, 2 * half), (down,))
    if "lm_head.weight" in tensors:  # else the head is the embedding, which others read
        yield Link("model.language_model.norm.weight", everything, ("lm_head.weight",))
    for number in range(_count(tensors, BLOCKS)):
        stem = f"{BLOCKS}{number}"
        gate, up, down = (f"{stem}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        yield Link(f"{stem}.norm1.weight", everything, (f"{stem}.attn.qkv.weight",))
        yield Link(f"{stem}.norm2.weight", everything, (gate, up))
        yield Link(up, everything, (down,))


def inject(tensors: Mapping[str, NDArray[np.float32]], scale: float, *, seed: int = 0) -> Tensors:
    """A copy with outlier channels of `scale` times the size."""
    rng = np.random.default_rng(seed)
    changed = {name: values.copy() for name, values in tensors.items()}
    for link in links(tensors):
        source = changed[link.source][link.rows]
        chosen = rng.choice(len(source), max(1, len(source) // CHANNELS_PER_OUTLIER), replace=False)
        source[chosen] *= np.float32(scale)  # a view
        bias = link.source.removesuffix("weight") + "bias"
        if source.ndim == 2 and bias in changed:
            changed[bias][link.rows][chosen] *= np.float32(scale)
        for name in link.readers:
            changed[name][:, chosen] /= np.float32(scale)
    return changed


def _count(tensors: Mapping[str, NDArray[np.float32]], stem: str) -> int:
    numbers = {int(name[len(stem) :].split(".")[0]) for name in tensors if name.startswith(stem)}
    return max(numbers, default=-1) + 1


def read_tensors(folder: Path) -> Tensors:
    """All weights of a checkpoint in float32."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name).astype(np.float32)
    return tensors


def write_checkpoint(tensors: Mapping[str, NDArray[np.float32]], source: Path, target: Path) -> Path:
    """A checkpoint folder with these weights and everything else of another.

    Returns:
        The folder.
    """
    target.mkdir(parents=True)
    for path in source.iterdir():
        if ".safetensors" not in path.name:
            shutil.copy(path, target)
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(contiguous, target / "model.safetensors", {"format": "pt"})
    return target


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description="Put outlier channels into a checkpoint.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=pocket_path(), help="default: pocket")
    parser.add_argument("--scale", type=float, default=100.0, help="of the outliers (default: 100)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, must not exist")
    arguments = parser.parse_args()
    tensors = inject(read_tensors(arguments.checkpoint), arguments.scale)
    write_checkpoint(tensors, arguments.checkpoint, arguments.output)


if __name__ == "__main__":
    main()
