"""Opens onnxruntime sessions: which device, how many threads, which options.

In: the file of a graph. Out: an `onnxruntime.InferenceSession`. Knows nothing of what a graph computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime as ort
from numpy.typing import NDArray

from autoglm_edge.errors import BundleError, DeviceError, RequestError

from .machine.topology import choose_threads

Device = Literal["cpu", "cuda"]
Weights = Literal["auto", "mapped", "packed", "prepared"]
PromptReader = Literal["native", "integer", "layers", "decoder"]
Prefill = Literal["auto", PromptReader]
PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MAX_THREADS = 1024
MAPPED = {"session.disable_prepacking": "1"}
"""Entries of a session whose weights stay in their file: fast only for graphs in integer form."""
SPINNING = {"session.intra_op.allow_spinning": "1", "session.force_spinning_stop": "1"}
"""Entries of a session whose threads wait awake for the next operator of a run, and sleep between runs."""
_MEMORY_SIGNS = ("allocate memory", "bad_alloc", "out of memory")


@dataclass(frozen=True)
class SessionOptions:
    """Where and how graphs run.

    Attributes:
        device: "cpu" or "cuda".
        threads: for one operator; 0 takes what fits the machine (`topology.choose_threads`).
        weights: where the decoder's weights are while it runs. "packed": copied into memory in the kernels'
            own layout. "prepared": the same layout, once per machine in a file of the user's cache folder and
            mapped from there. "mapped": the bundle's own file, for graphs in integer form. "auto" chooses.
        prefill: "native" reads prompts by compiled kernels, on CPUs with AMX; "integer" through the bundle's
            prefill graph; "layers" layer by layer, with weights that are expanded to 8 bits on the way;
            "decoder" through the decoder. "auto" chooses.
        prepare: with weights "auto", make prepared weights of a large bundle that has none.
        traces: a folder in which onnxruntime leaves a trace of every session when it is closed: what each
            operator of each run took. None, as a rule: it takes memory as long as the session lives.
        kernels: with prefill "auto", compiled kernels may read prompts; False leaves that to the graphs, as
            on processors that the kernels are not for.
    """

    device: Device = "cpu"
    threads: int = 0
    weights: Weights = "auto"
    prefill: Prefill = "auto"
    prepare: bool = True
    traces: Path | None = None
    kernels: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or self.device not in PROVIDERS:
            raise DeviceError(f"device is {self.device!r}, must be one of {', '.join(PROVIDERS)}")
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if not whole or not 0 <= self.threads <= MAX_THREADS:
            raise DeviceError(f"threads is {self.threads!r}, must be 0 (one per core) to {MAX_THREADS}")
        for name, value, choices in (
            ("weights", self.weights, get_args(Weights)),
            ("prefill", self.prefill, get_args(Prefill)),
        ):
            if value not in choices:
                raise RequestError(f"{name} is {value!r}, must be one of {', '.join(choices)}")
        for name, flag in (("kernels", self.kernels), ("prepare", self.prepare)):
            if not isinstance(flag, bool):
                raise RequestError(f"{name} is {flag!r}, must be True or False")
        if self.traces is not None and not (isinstance(self.traces, Path) and self.traces.is_dir()):
            raise RequestError(f"traces is {self.traces!r}, must be the path of a folder that is there")
        if PROVIDERS[self.device] not in ort.get_available_providers():
            raise DeviceError(
                f"device {self.device!r} needs {PROVIDERS[self.device]}, but this onnxruntime only offers "
                f"{', '.join(ort.get_available_providers())}; install onnxruntime-gpu or use device 'cpu'"
            )

    @property
    def thread_count(self) -> int:
        """Threads that one operator uses."""
        return choose_threads(self.threads).count


def session_settings(options: SessionOptions, entries: Mapping[str, str] | None = None) -> ort.SessionOptions:
    """What all sessions have in common, and the entries of this one."""
    settings = ort.SessionOptions()
    threads = choose_threads(options.threads)
    settings.intra_op_num_threads = threads.count
    if threads.cpus and threads.count > 1:
        # The calling thread is the first one, and not ours to move. CPUs are counted from 1 here.
        everywhere = ",".join(str(cpu + 1) for cpu in threads.cpus)
        settings.add_session_config_entry(
            "session.intra_op_thread_affinities", ";".join([everywhere] * (threads.count - 1))
        )
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # Plans of memory are kept for every set of input shapes that was ever seen, and here each step and each
    # prompt has shapes of its own: memory would grow for ever.
    settings.enable_mem_pattern = False
    # As a rule a waiting thread sleeps: that is several times faster on a busy machine.
    usual = {"session.prepack.enable_parallel": "1", "session.intra_op.allow_spinning": "0"}
    for name, value in {**usual, **(entries or {})}.items():
        settings.add_session_config_entry(name, value)
    return settings


def open_session(
    graph: Path, options: SessionOptions, *, entries: Mapping[str, str] | None = None, optimize: bool = True
) -> ort.InferenceSession:
    """Load a graph with its weights.

    Args:
        graph: its file.
        options: device and threads; where the weights go is said by `entries`.
        entries: session entries of onnxruntime, such as `MAPPED`.
        optimize: False for a graph that was saved optimized.

    Raises:
        BundleError: onnxruntime refuses the file.
        DeviceError: the device's libraries cannot be loaded.
    """
    settings = session_settings(options, entries)
    if not optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.traces is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(options.traces / graph.stem)
    try:
        session = ort.InferenceSession(graph, settings, providers=_providers(options))
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise BundleError(
            f"{graph} cannot be loaded by onnxruntime {ort.__version__} ({_first_line(error)}); "
            "check the bundle with `autoglm info --verify`, then export it again"
        ) from error
    # Where its libraries are missing, a provider is left out with no more than a line in a log.
    if PROVIDERS[options.device] not in session.get_providers():
        raise DeviceError(
            f"device {options.device!r} is offered by this onnxruntime, but its libraries cannot be loaded; "
            "install the CUDA and cuDNN that onnxruntime-gpu names, call onnxruntime.preload_dlls() first, "
            "or use device 'cpu'"
        )
    session.disable_fallback()  # it would print to stdout and go on with another provider
    return session


def shrinking_run() -> ort.RunOptions:
    """Options of a run on the CPU that gives the memory of its activations back at its end."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


class Binding:
    """Runs of one session whose large buffers stay where they are, bound once.

    A buffer may be bound as an input and as an output: the graph then appends to it in place.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Mapping[str, ort.OrtValue],
        outputs: Mapping[str, ort.OrtValue],
    ) -> None:
        """Bind what is the same in every run."""
        self._session = session
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        fetches: Mapping[str, NDArray[Any]],
        options: ort.RunOptions | None = None,
    ) -> None:
        """Run once.

        Args:
            feeds: the remaining inputs, contiguous, on the host; read in place where the session runs there.
            fetches: arrays that the remaining outputs are written into, contiguous, on the host.
            options: of this run.

        Raises:
            BundleError: the graph fails.
            DeviceError: there is not enough memory.
        """
        # Host values do not own their arrays: both must outlive the run.
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        results = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in fetches.items()}
        with run_errors("the decoder"):
            for name, value in values.items():
                self._binding.bind_ortvalue_input(name, value)
            for name, value in results.items():
                self._binding.bind_ortvalue_output(name, value)
            self._session.run_with_iobinding(self._binding, options)


@contextmanager
def run_errors(what: str) -> Iterator[None]:
    """Turn what onnxruntime raises in a run into an error of ours.

    Raises:
        DeviceError: there is not enough memory.
        BundleError: anything else.
    """
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        reason = _first_line(error)
        if isinstance(error, MemoryError) or any(sign in reason for sign in _MEMORY_SIGNS):
            raise DeviceError(
                f"there is not enough memory to run {what} ({reason}); load with a smaller context or "
                "max_image_tokens, or send fewer images"
            ) from error
        raise BundleError(
            f"{what} fails in onnxruntime {ort.__version__} ({reason}); check the bundle with "
            "`autoglm info --verify`, then export it again"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _providers(options: SessionOptions) -> list[str]:
    wanted = PROVIDERS[options.device]
    return [wanted] if options.device == "cpu" else [wanted, PROVIDERS["cpu"]]
