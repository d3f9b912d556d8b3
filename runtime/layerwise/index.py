"""Where the weights of each decoder layer lie in the decoder's data file, and what they become in a run.

In: the index file of a bundle (docs/bundle.md, "The layer"). Out: a `LayerIndex`: `LayerWeights` in the order
of the layers, what a layer computes with them, and from a mapped data file the arrays themselves. The export
writes the file with `index_to_json`. Knows nothing of graphs and runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError

from .blocks import Blocks


@dataclass(frozen=True)
class Matrix:
    """Where a matrix of one layer lies, in block format, and which graph inputs it becomes.

    Attributes:
        weight: graph input for the integers (K, N).
        scales: graph input for the scales (N,).
        rows: N.
        columns: K.
        bits: of a stored field, 4 or 8.
        block_size: weights per block.
        data_offset: byte offset of the fields in the decoder's data file.
        scales_offset: of the float32 scales.
        zero_points_offset: of the zero points, or -1 for symmetric formats.
    """

    weight: str
    scales: str
    rows: int
    columns: int
    bits: int
    block_size: int
    data_offset: int
    scales_offset: int
    zero_points_offset: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.block_size not in (32, 64, 128):
            raise BundleError(f"{self.weight} has {self.bits} bits in blocks of {self.block_size}; {AGAIN}")
        if min(self.rows, self.columns) < 1 or min(self.data_offset, self.scales_offset) < 0:
            raise BundleError(f"{self.weight} has a size or place below zero; {AGAIN}")

    @property
    def blocks(self) -> int:
        """Blocks of a row; the last may be padded."""
        return -(-self.columns // self.block_size)

    def read(self, data: NDArray[np.uint8]) -> Blocks:
        """The matrix in a mapped data file, (bytes,) uint8; nothing is copied.

        Raises:
            BundleError: it would lie beyond the end.
        """
        size = self.block_size * self.bits // 8
        zero_points = None
        if self.zero_points_offset >= 0:
            width = -(-self.blocks * self.bits // 8)
            zero_points = cut_array(data, self.zero_points_offset, (self.rows, width), np.uint8, self.weight)
        return Blocks(
            cut_array(data, self.data_offset, (self.rows, self.blocks, size), np.uint8, self.weight),
            cut_array(data, self.scales_offset, (self.rows, self.blocks), np.float32, self.weight),
            zero_points,
            self.columns,
            self.bits,
        )


@dataclass(frozen=True)
class Vector:
    """Where a norm or bias of one layer lies.

    Attributes:
        name: graph input.
        length: values, float32.
        offset: byte offset in the decoder's data file.
    """

    name: str
    length: int
    offset: int

    def __post_init__(self) -> None:
        if self.length < 1 or self.offset < 0:
            raise BundleError(f"{self.name} has {self.length} values at {self.offset}; {AGAIN}")


@dataclass(frozen=True)
class LayerWeights:
    """All weights of one layer.

    Attributes:
        matrices: in block format.
        vectors: norms and biases.
    """

    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the graph inputs that these weights become."""
        found: dict[str, tuple[int, ...]] = {}
        for matrix in self.matrices:
            found[matrix.weight] = (matrix.columns, matrix.rows)
            found[matrix.scales] = (matrix.rows,)
        return found | {vector.name: (vector.length,) for vector in self.vectors}


@dataclass(frozen=True)
class LayerForm:
    """What a layer computes beside its weights' shapes, for a runtime that does without the graph.

    Attributes:
        norm_eps: added to mean squares.
        rope_theta: base of the rotary embedding.
        rotary_dim: values of a head that turn, the first ones, in pairs of neighbours.
        mrope_section: pairs that turn by time, height and width, in this order.
    """

    norm_eps: float
    rope_theta: float
    rotary_dim: int
    mrope_section: tuple[int, ...]

    def __post_init__(self) -> None:
        pairs = self.mrope_section
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in pairs):
            raise BundleError(f"mrope_section is {list(pairs)}, must be three integers; {AGAIN}")
        if len(pairs) != 3 or min(pairs) < 0 or 2 * sum(pairs) != self.rotary_dim:
            raise BundleError(f"mrope_section is {list(pairs)}, rotary_dim {self.rotary_dim}; {AGAIN}")
        if not (0 < self.norm_eps < 1 and 0 < self.rope_theta < math.inf):
            raise BundleError(f"norm_eps is {self.norm_eps}, rope_theta {self.rope_theta}; {AGAIN}")

    @classmethod
    def from_json(cls, entry: Any) -> LayerForm:
        """As it stands in an index.

        Raises:
            BundleError: it is something else.
        """
        if isinstance(entry, dict) and isinstance(entry.get("mrope_section"), list):
            entry = entry | {"mrope_section": tuple(entry["mrope_section"])}
        found: LayerForm = _built(cls, entry)
        return found


@dataclass(frozen=True)
class LayerIndex:
    """What the file holds.

    Attributes:
        layers: in their order, all of one shape.
        form: None in bundles from before it was stored.
    """

    layers: tuple[LayerWeights, ...]
    form: LayerForm | None = None


def index_to_json(index: LayerIndex) -> str:
    """The index as it stands in a bundle; read by `read_index`."""
    document = [
        {
            "matrices": [vars(matrix) for matrix in layer.matrices],
            "vectors": [vars(vector) for vector in layer.vectors],
        }
        for layer in index.layers
    ]
    form = {} if index.form is None else {"form": vars(index.form)}
    return json.dumps({**form, "layers": document}, indent=1) + "\n"


def read_index(path: Path, layers: int) -> LayerIndex:
    """Read where the weights of each layer lie.

    Args:
        path: the index file.
        layers: how many the model has.

    Raises:
        BundleError: not such a file, of another number of layers, or layers of different shapes.
    """
    try:
        document = json.loads(path.read_bytes())
        found = tuple(
            LayerWeights(
                tuple(_built(Matrix, entry) for entry in layer["matrices"]),
                tuple(_built(Vector, entry) for entry in layer["vectors"]),
            )
            for layer in document["layers"]
        )
        form = LayerForm.from_json(document["form"]) if "form" in document else None
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not an index of layers ({error}); {AGAIN}") from error
    if len(found) != layers or any(layer.shapes != found[0].shapes for layer in found):
        raise BundleError(f"{path} must have {layers} layers of one shape; {AGAIN}")
    return LayerIndex(found, form)


def cut_array(
    data: NDArray[np.uint8], offset: int, shape: tuple[int, ...], kind: Any, name: str
) -> NDArray[Any]:
    """An array inside the mapped file.

    Raises:
        BundleError: it would lie beyond the end, or on an odd address.
    """
    size = math.prod(shape) * np.dtype(kind).itemsize
    if offset % np.dtype(kind).itemsize or offset + size > len(data):
        raise BundleError(f"{name} is said to lie at {offset} of {len(data)} bytes; {AGAIN}")
    found: NDArray[Any] = np.asarray(data[offset : offset + size]).view(kind).reshape(shape)
    return found


def _built(kind: Any, entry: Any) -> Any:
    """A record from JSON; every field there, of its type, and no other."""
    hints = {"str": str, "int": int, "float": float, "tuple[int, ...]": tuple}
    wanted = {name: hints[hint] for name, hint in kind.__annotations__.items()}
    if not isinstance(entry, dict) or entry.keys() != wanted.keys():
        raise BundleError(f"an entry has the keys {sorted(entry)}, must have {sorted(wanted)}; {AGAIN}")
    for name, expected in wanted.items():
        if not isinstance(entry[name], expected) or isinstance(entry[name], bool):
            raise BundleError(f"{name} is {entry[name]!r}, must be of type {expected.__name__}; {AGAIN}")
    return kind(**entry)


AGAIN = "graph, index and data are not of one export; export the checkpoint again"
