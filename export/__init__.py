"""From a checkpoint to a bundle: reading weights, building graphs, quantizing while writing.

    from autoglm_edge.export import estimate, export

    print(estimate("zai-org/AutoGLM-Phone-9B", "out/").to_table())
    bundle = export("zai-org/AutoGLM-Phone-9B", "out/", precision="int4")

The package can be called: `autoglm_edge.export(...)` is `pipeline.export(...)`, whether or not this package
has been imported before and thereby taken the name. Names are resolved when they are first used. Needs
neither torch nor transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forecast import Estimate
    from .options import ExportOptions
    from .pipeline import estimate, export
    from .progress import Progress, ProgressEvent

__all__ = ["Estimate", "ExportOptions", "Progress", "ProgressEvent", "estimate", "export"]

_LAZY = {
    "Estimate": ".forecast",
    "ExportOptions": ".options",
    "Progress": ".progress",
    "ProgressEvent": ".progress",
    "estimate": ".pipeline",
    "export": ".pipeline",
}


class _Callable(ModuleType):
    """A module that can be called like the function it is named after."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `pipeline.export`."""
        return import_module(".pipeline", __name__).export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
