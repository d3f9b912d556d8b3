"""Run the phone agent AutoGLM-Phone-9B on the hardware you have.

    import autoglm_edge as ag

    bundle = ag.export("zai-org/AutoGLM-Phone-9B", "out/", precision="int4")
    with ag.load("out/") as engine:
        for delta in engine.chat([{"role": "user", "content": [picture, words]}]):
            print(delta.text, end="")

Names are resolved when they are first used: importing this package imports neither onnxruntime nor the
exporter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    BundleError,
    CheckpointError,
    ContextLengthError,
    DependencyError,
    DeviceError,
    EdgeError,
    ExportError,
    ImageError,
    ParityError,
    PromptError,
    QuantError,
    RequestError,
    SimulationError,
)

if TYPE_CHECKING:
    from autoglm_edge.android_sim.simulate import simulate
    from autoglm_edge.export.pipeline import estimate, export
    from autoglm_edge.parity.record import record
    from autoglm_edge.parity.validate import validate
    from autoglm_edge.runtime.actions import Action, parse_action
    from autoglm_edge.runtime.answer import Delta, Timings, Usage
    from autoglm_edge.runtime.bundle import Bundle
    from autoglm_edge.runtime.engine import Engine
    from autoglm_edge.runtime.reuse.options import ReuseOptions
    from autoglm_edge.runtime.sampling import SamplingParams

    load = Engine.load

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "ContextLengthError",
    "Delta",
    "DependencyError",
    "DeviceError",
    "EdgeError",
    "Engine",
    "ExportError",
    "ImageError",
    "ParityError",
    "PromptError",
    "QuantError",
    "RequestError",
    "ReuseOptions",
    "SamplingParams",
    "SimulationError",
    "Timings",
    "Usage",
    "estimate",
    "export",
    "load",
    "parse_action",
    "record",
    "simulate",
    "validate",
]

_LAZY = {
    "Action": "autoglm_edge.runtime.actions",
    "Bundle": "autoglm_edge.runtime.bundle",
    "Delta": "autoglm_edge.runtime.answer",
    "Engine": "autoglm_edge.runtime.engine",
    "ReuseOptions": "autoglm_edge.runtime.reuse.options",
    "SamplingParams": "autoglm_edge.runtime.sampling",
    "Timings": "autoglm_edge.runtime.answer",
    "Usage": "autoglm_edge.runtime.answer",
    "estimate": "autoglm_edge.export.pipeline",
    "export": "autoglm_edge.export.pipeline",
    "parse_action": "autoglm_edge.runtime.actions",
    "record": "autoglm_edge.parity.record",
    "simulate": "autoglm_edge.android_sim.simulate",
    "validate": "autoglm_edge.parity.validate",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "load":
        return import_module("autoglm_edge.runtime.engine").Engine.load
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
