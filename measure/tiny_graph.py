"""ONNX graphs of one operator, written byte by byte, so that a measurement needs no package to make them.

In: operator, inputs, constant tensors. Out: the bytes of a ModelProto. Only what `bandwidth.py` needs of the
format (onnx.proto3: field numbers of ModelProto, GraphProto, NodeProto, TensorProto, ValueInfoProto); knows
no operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int64": 7, "float16": 10}
_IR_VERSION, _OPSET = 10, 21
_VARINT, _BYTES = 0, 2


def one_node(
    operator: str,
    inputs: Mapping[str, tuple[str, Sequence[int | str]]],
    order: Sequence[str],
    constants: Mapping[str, NDArray[Any]],
    output: tuple[str, Sequence[int | str]],
    domain: str = "",
) -> bytes:
    """A model of one node.

    Args:
        operator: its type.
        inputs: dtype and shape by name; a string in a shape is an axis that varies.
        order: names of the node's inputs, an empty one for one that is left out.
        constants: weights by name.
        output: dtype and shape of the output, which is named "y".
        domain: of the operator; "" is ONNX itself.
    """
    node = b"".join(_field(1, name) for name in order) + _field(2, "y") + _field(4, operator)
    graph = _field(1, node + _field(7, domain)) + _field(2, "one")
    graph += b"".join(_field(5, _tensor(name, value)) for name, value in constants.items())
    graph += b"".join(_field(11, _value(name, *declared)) for name, declared in inputs.items())
    graph += _field(12, _value("y", *output))
    opsets = _field(8, _field(2, _OPSET))
    if domain:
        opsets += _field(8, _field(1, domain) + _field(2, 1))
    return _field(1, _IR_VERSION) + opsets + _field(7, graph)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a message: an integer, a string or a message."""
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _tensor(name: str, value: NDArray[Any]) -> bytes:
    dims = b"".join(_field(1, int(size)) for size in value.shape)
    return (
        dims
        + _field(2, _TYPES[value.dtype.name])
        + _field(8, name)
        + _field(9, np.ascontiguousarray(value).tobytes())
    )


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(_field(1, _field(1 if isinstance(size, int) else 2, size)) for size in shape)
    tensor = _field(1, _TYPES[dtype]) + _field(2, dims)
    return _field(1, name) + _field(2, _field(1, tensor))
