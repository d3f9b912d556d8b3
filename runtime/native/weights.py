"""The weights of a decoder layer as they lie in a bundle, by their names in it, and the layer's widths.

In: an entry of the index of layers, the mapped data file. Out: views; nothing is read. Knows nothing of what
is computed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError
from autoglm_edge.runtime.layerwise.blocks import Blocks
from autoglm_edge.runtime.layerwise.index import AGAIN, LayerForm, LayerWeights, cut_array

Floats = NDArray[np.float32]

_STEM = "layer."
_DATA = ".weight_data"


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


def _found(things: dict[str, Any], name: str) -> Any:
    try:
        return things[name]
    except KeyError:
        raise BundleError(f"the layers have no {name}; {AGAIN}") from None
