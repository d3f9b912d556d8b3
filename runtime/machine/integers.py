"""Can this CPU multiply unsigned by signed bytes without error, and does it have units for it?

In: nothing; a graph of one product is run once per process. Out: `Integers`. Knows nothing of bundles.

On x86 without VNNI, onnxruntime's kernel adds two products of bytes in 16 bits and cuts off what does not
fit: the graph runs, and its answer is wrong. Which kernel runs depends on the CPU, on the release, on the
number of rows and on whether the weights are repacked, so it is asked, with the largest values, and not
looked up. onnxruntime can also store the signed weights as unsigned ones ("widened"), whose kernel is slower
and exact.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

WIDENED = {"session.x64quantprecision": "1"}
"""Session entries under which products are exact on x86 without VNNI."""

UNITS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""CPU flags of units for products of bytes, as Linux names them, best first."""
PACKING = (
    *UNITS,
    *("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    *("asimdhp", "bf16", "sve", "sve2", "svei8mm", "sme", "sme2"),
)
"""CPU flags that may change how onnxruntime lays out packed weights."""

_ROWS, _DEPTH, _COLUMNS = (1, 5, 40), 96, 48
_FLOAT, _UINT8, _INT8 = 1, 2, 3


@dataclass(frozen=True)
class Integers:
    """Products of unsigned and signed bytes on this CPU.

    Attributes:
        exact: they are, as a graph is opened by default and without repacked weights.
        widened: they are in sessions with the entries `WIDENED`.
        unit: flag of the CPU's unit for them; "" where there is none, None where it cannot be read.
    """

    exact: bool
    widened: bool
    unit: str | None

    @property
    def reason(self) -> str:
        """What was found, a part of a sentence."""
        if not self.exact:
            return "8-bit products of this CPU are cut off at 16 bits"
        if self.unit is None:
            return "8-bit products are exact"
        return f"8-bit products are exact ({self.unit or 'no unit for them'})"


@cache
def integers() -> Integers:
    """Ask once per process."""
    return Integers(
        exact=_exact({}) and _exact({"session.disable_prepacking": "1"}),
        widened=_exact(WIDENED),
        unit=_unit(cpu_flags()),
    )


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """Flags of the first CPU; None where the system does not list them."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return None


def instruction_set(flags: frozenset[str] | None) -> str:
    """The CPU as far as packed weights depend on it, such as "x86_64+avx2+fma"."""
    if flags is None:
        return "+".join(filter(None, (platform.machine(), platform.processor(), platform.system())))
    return "+".join((platform.machine(), *sorted(flags.intersection(PACKING))))


def _unit(flags: frozenset[str] | None) -> str | None:
    return None if flags is None else next((unit for unit in UNITS if unit in flags), "")


def _exact(entries: dict[str, str]) -> bool:
    """Whether products of the largest values come out right, for one row and for several."""
    rng = np.random.default_rng(4)
    weight = rng.choice(np.array([-127, 127], np.int8), (_DEPTH, _COLUMNS))
    weight[:, 0], weight[:, 1] = 127, -127
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    for name, value in entries.items():
        settings.add_session_config_entry(name, value)
    session = ort.InferenceSession(product_graph(weight), settings, providers=["CPUExecutionProvider"])
    for rows in _ROWS:
        values = rng.choice(np.array([0, 255], np.uint8), (rows, _DEPTH))
        values[0] = 255
        (found,) = session.run(None, {"a": values})
        if not np.array_equal(found, (values.astype(np.int64) - 128) @ weight.astype(np.int64)):
            return False
    return True


def product_graph(weight: np.ndarray) -> bytes:
    """A model of one MatMulIntegerToFloat: a (M, K) uint8 with zero point 128 times `weight` (K, N) int8.

    Written out as ONNX's protocol buffers, since the runtime does without the package onnx.
    """
    depth, columns = weight.shape
    constants = (
        _tensor("w", _INT8, weight.astype(np.int8)),
        _tensor("one", _FLOAT, np.array(1, np.float32)),
        _tensor("scale", _FLOAT, np.ones(columns, np.float32)),
        _tensor("middle", _UINT8, np.array(128, np.uint8)),
    )
    operands = b"".join(_bytes(1, name) for name in (b"a", b"w", b"one", b"scale", b"middle"))
    node = operands + _bytes(2, b"y") + _bytes(4, b"MatMulIntegerToFloat") + _bytes(7, b"com.microsoft")
    graph = _bytes(1, node) + _bytes(2, b"product") + b"".join(_bytes(5, constant) for constant in constants)
    graph += _bytes(11, _value(b"a", _UINT8, depth)) + _bytes(12, _value(b"y", _FLOAT, columns))
    opsets = _bytes(8, _bytes(1, b"") + _number(2, 17)) + _bytes(
        8, _bytes(1, b"com.microsoft") + _number(2, 1)
    )
    return _number(1, 8) + _bytes(7, graph) + opsets


def _tensor(name: str, kind: int, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, kind) + _bytes(8, name.encode()) + _bytes(9, array.tobytes())


def _value(name: bytes, kind: int, width: int) -> bytes:
    """A matrix of any number of rows."""
    shape = _bytes(1, _bytes(2, b"M")) + _bytes(1, _number(1, width))
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
