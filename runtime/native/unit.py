"""Which unit of this CPU the compiled kernels would use.

In: nothing. Out: `Unit`. Knows nothing of graphs and weights.

The kernels exist twice: for AMX, which is what they are for, and for AVX-512 with VNNI and BF16, on which
onnxruntime's own kernels are as good or better. The second kind says on many more machines whether what is
around the products is right, so tests use it; a runtime does not.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any

try:
    from . import _kernels
except ImportError:  # no compiler when the package was installed
    _kernels = None  # type: ignore[assignment]

kernels: Any = _kernels
"""The compiled module; None where there is none."""


class Unit(IntEnum):
    """What multiplies tiles, worst first."""

    NONE = 0
    VECTORS = 1
    MATRICES = 2


@cache
def best_unit() -> Unit:
    """Ask once per process; on the way the system is asked to let this process use AMX."""
    return Unit.NONE if kernels is None else Unit(kernels.find_unit())


def unit_reason() -> str:
    """Why the kernels are used or not, a part of a sentence."""
    if kernels is None:
        return "no C compiler was there at installation"
    if best_unit() == Unit.MATRICES:
        return "on AMX"
    return "this CPU, system or compiler has no AMX"
