"""Opens onnxruntime sessions: which device, how many threads, which options.

In: the file of a graph. Out: an `onnxruntime.InferenceSession`. Knows nothing of what a graph computes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

from autoglm_edge.errors import BundleError, DeviceError

Device = Literal["cpu", "cuda"]
PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class SessionOptions:
    """Where and how graphs run.

    Attributes:
        device: "cpu" or "cuda".
        threads: for one operator; 0 takes one per core that this process may use.
    """

    device: Device = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.device not in PROVIDERS:
            raise DeviceError(f"device is {self.device!r}, must be one of {', '.join(PROVIDERS)}")
        if self.threads < 0:
            raise DeviceError(f"threads is {self.threads}, must be 0 (one per core) or more")
        if PROVIDERS[self.device] not in ort.get_available_providers():
            raise DeviceError(
                f"device {self.device!r} needs {PROVIDERS[self.device]}, but this onnxruntime only offers "
                f"{', '.join(ort.get_available_providers())}; install onnxruntime-gpu or use device 'cpu'"
            )

    @property
    def thread_count(self) -> int:
        """Threads that one operator uses."""
        return self.threads or usable_cores()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(graph: Path, options: SessionOptions) -> ort.InferenceSession:
    """Load a graph with its weights.

    Raises:
        BundleError: onnxruntime refuses the file.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.thread_count
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.prepack.enable_parallel", "1")
    try:
        return ort.InferenceSession(graph, settings, providers=_providers(options))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"{graph} cannot be loaded by onnxruntime {ort.__version__} ({reason}); "
            "check the bundle with `autoglm info --verify`, then export it again"
        ) from error


def run_in_place(
    session: ort.InferenceSession,
    feeds: Mapping[str, ort.OrtValue],
    fetches: Mapping[str, ort.OrtValue],
    options: ort.RunOptions | None = None,
) -> None:
    """Run into given output buffers; an output may be the same buffer as an input.

    An `IOBinding` would do the same, but it refuses inputs that have a default in the graph.
    """
    devices = [
        ort.OrtDevice.make(value.device_name().lower(), 0)._get_c_device() for value in fetches.values()
    ]
    session.run_with_ortvaluevector(
        options or ort.RunOptions(), list(feeds), _vector(feeds), list(fetches), _vector(fetches), devices
    )


def _vector(values: Mapping[str, ort.OrtValue]) -> OrtValueVector:
    vector = OrtValueVector()
    for value in values.values():
        vector.push_back(value._ortvalue)
    return vector


def _providers(options: SessionOptions) -> list[str]:
    wanted = PROVIDERS[options.device]
    return [wanted] if options.device == "cpu" else [wanted, PROVIDERS["cpu"]]
