"""Prepared weights: what onnxruntime packs at each load, packed once per machine, kept in a file and mapped.

In: a bundle and the name of a part. Out: a graph in the user's cache folder whose weights are already in the
layout of this CPU's kernels. Knows nothing of what a graph computes.

    CACHE/prepared/KEY/          one part of one bundle, for one kind of CPU and one release of onnxruntime
        PART.onnx                the graph, optimized
        PART.onnx.data           its weights, as they were and packed: onnxruntime wants both
        prepared.json            the marker: made of what, and what the files are
    CACHE/prepared/KEY.lock      held while KEY is made
    CACHE/prepared/KEY.part-PID  growing; renamed to KEY when everything is on the disk

CACHE is AUTOGLM_EDGE_CACHE, or the folder `autoglm-edge` where the system keeps its users' caches. Nothing
found there is trusted: the marker must name this bundle, part, CPU and release, and the files must have the
sizes, the graph the digest and the data the sampled digest of the marker. Anything else counts as not there.

Before anything is put in place it is opened and run, and its outputs must be, bit for bit, those of the graph
that it was made of. onnxruntime packs again while it loads and takes from the file what is equal, so a load
is not free, but nothing of it stays in anonymous memory. A file whose packed weights differ (another kind of
CPU after all) does no harm beyond that: it is not used. Bits that flip between the sampled pages are not
seen, as in the bundle itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from autoglm_edge.errors import BundleError, DeviceError
from autoglm_edge.files import try_lock
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.session import SessionOptions

from .folders import cache_folder
from .integers import cpu_flags, instruction_set
from .limits import anonymous_bytes, available_bytes
from .packing import data_of, pack

MARKER_NAME = "prepared.json"
MARKER_VERSION = 1
MARKER_LIMIT_BYTES = 1 << 16
GROWTH = 2.15
"""Bytes of prepared data per byte of weights: the weights, packed, with sums of blocks."""
SPARE_BYTES = 1 << 30
"""What must be left on the disk."""
SAMPLES = 256
SAMPLE_BYTES = 4096
_WATCH_SECONDS = 0.2

_log = logging.getLogger(__name__)


class Tell(Protocol):
    """Who is told what takes long. `autoglm_edge.commands.progress.ProgressLine` is one."""

    def say(self, text: str) -> None:
        """A sentence."""

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """How far a stage is; called from another thread."""


class LogTell:
    """Sentences go to the log, progress nowhere."""

    def say(self, text: str) -> None:
        """Log it as a warning: it is about minutes, gigabytes, or something that failed."""
        _log.warning("%s", text)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Origin:
    """What prepared weights were made of, and for.

    Attributes:
        bundle: fingerprint.
        part: name.
        instruction_set: of the CPU, as far as packing depends on it.
        onnxruntime: version.
    """

    bundle: str
    part: str
    instruction_set: str
    onnxruntime: str

    @classmethod
    def of(cls, bundle: Bundle, part: str) -> Origin:
        """Of a part of a bundle, here."""
        return cls(bundle.fingerprint, part, instruction_set(cpu_flags()), ort.__version__)

    @property
    def key(self) -> str:
        """Name of its folder."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return f"{self.bundle[:16]}-{self.part}-{digest[:16]}"


@dataclass(frozen=True)
class State:
    """What is there for a part.

    Attributes:
        graph: the file to open, if it is ready.
        ready: it may be used.
        reason: why not; "" if it is.
        bytes: size of the folder's files.
    """

    graph: Path
    ready: bool
    reason: str
    bytes: int


def prepared_root() -> Path:
    """The folder of all prepared weights."""
    return cache_folder() / "prepared"


def prepared_state(bundle: Bundle, part: str) -> State:
    """Look whether usable prepared weights of a part are there. Reads about a megabyte of them."""
    origin = Origin.of(bundle, part)
    try:
        folder = prepared_root() / origin.key
    except DeviceError as error:
        return State(Path(f"{part}.onnx"), False, str(error), 0)
    graph = folder / f"{part}.onnx"
    try:
        reason = _fault(folder, graph, origin)
        size = sum(file.lstat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    except OSError as error:
        return State(graph, False, f"{folder} cannot be read ({error.strerror or error})", 0)
    return State(graph, not reason, reason, size)


def room_for(bundle: Bundle, part: str) -> str:
    """Why prepared weights of a part cannot be made here, a part of a sentence; "" if they can."""
    weights = bundle.manifest.parts[part].weight_bytes
    memory = available_bytes()
    if memory is not None and memory < weights * 1.2:
        return f"packing takes {_gb(weights * 1.2)} of memory, {_gb(memory)} are available"
    try:
        root = prepared_root()
    except DeviceError as error:
        return str(error)
    existing = next(folder for folder in (root, *root.parents) if folder.is_dir() or folder == folder.parent)
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return f"{existing} cannot be read ({error.strerror or error})"
    need = int(weights * GROWTH) + SPARE_BYTES
    return f"they take {_gb(need)} in {root}, {_gb(free)} are free" if free < need else ""


def prepare(bundle: Bundle, part: str, options: SessionOptions, tell: Tell) -> Path:
    """Make the prepared weights of a part, unless they are there.

    Args:
        bundle: opened bundle.
        part: a part on the CPU.
        options: threads; nothing made depends on them.
        tell: told of a wait and of the progress.

    Returns:
        The graph to open.

    Raises:
        DeviceError: there is not enough room, or the cache folder cannot be written.
        BundleError: onnxruntime refuses the part.
    """
    origin = Origin.of(bundle, part)
    final = prepared_root() / origin.key
    growing = final.with_name(f"{origin.key}.part-{os.getpid()}")
    try:
        with _locked(final.with_name(f"{origin.key}.lock"), tell):
            state = prepared_state(bundle, part)
            if state.ready:
                return state.graph
            for stale in (final, *final.parent.glob(f"{origin.key}.part-*")):
                _discard(stale)
            if reason := room_for(bundle, part):
                raise DeviceError(f"no prepared weights for {part}: {reason}; free some, or do without them")
            try:
                growing.mkdir(mode=0o700)
                _write(bundle, origin, growing, options, tell)
                os.rename(growing, final)
            except BaseException:
                _discard(growing)
                raise
    except OSError as error:
        raise DeviceError(
            f"no prepared weights for {part}: {error.filename or final.parent} cannot be written "
            f"({error.strerror or error}); set AUTOGLM_EDGE_CACHE to another folder, or do without them"
        ) from error
    return final / state.graph.name


def remove_prepared(bundle: Bundle) -> int:
    """Delete what is there of a bundle, also for other CPUs and releases.

    Returns:
        Bytes freed.

    Raises:
        DeviceError: the cache folder cannot be written.
    """
    freed = 0
    try:
        for folder in prepared_root().glob(f"{bundle.fingerprint[:16]}-*"):
            if folder.is_dir() and not folder.is_symlink():
                freed += sum(file.lstat().st_size for file in folder.iterdir())
            _discard(folder)
    except OSError as error:
        raise DeviceError(
            f"{error.filename or prepared_root()} cannot be deleted ({error.strerror or error}); "
            "delete it by hand"
        ) from error
    return freed


def discard_prepared(bundle: Bundle, part: str) -> None:
    """Delete what is there of one part, here, so that it is made again; a folder that refuses is left."""
    try:
        _discard(prepared_root() / Origin.of(bundle, part).key)
    except OSError as error:
        _log.warning("%s cannot be deleted (%s)", error.filename, error.strerror)


def _write(bundle: Bundle, origin: Origin, folder: Path, options: SessionOptions, tell: Tell) -> None:
    """Pack a part, and write its files and marker into `folder`."""
    part = bundle.manifest.parts[origin.part]
    graph = folder / f"{origin.part}.onnx"
    data = data_of(graph)
    total = int(part.weight_bytes * (1 + GROWTH))
    before = anonymous_bytes() or 0

    def done() -> int:
        packed = max(0, (anonymous_bytes() or 0) - before)
        return min(packed, part.weight_bytes) + (data.stat().st_size if data.exists() else 0)

    with _watched(lambda: tell.show("Preparing", min(done(), total - 1), total)):
        try:
            pack(bundle.file(part.graph), graph, bundle.manifest, origin.part, options)
        except BundleError as error:
            free = shutil.disk_usage(folder).free
            if free > SPARE_BYTES:
                raise
            raise DeviceError(
                f"no prepared weights for {origin.part}: the disk of {folder.parent} is full "
                f"({_gb(free)} left); free some, or do without them"
            ) from error
    marker = {"version": MARKER_VERSION, **asdict(origin), **_describe(graph, data)}
    path = folder / MARKER_NAME
    with path.open("w") as file:
        file.write(json.dumps(marker, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    tell.show("Preparing", total, total)


def _fault(folder: Path, graph: Path, origin: Origin) -> str:
    """Why the files of a folder may not be used; "" if they may."""
    if not os.path.lexists(folder):
        return "not prepared yet"
    path, data = folder / MARKER_NAME, data_of(graph)
    for place in (folder.parent, folder, path, graph, data):
        if not os.path.lexists(place):
            return f"{place.name} is missing"
        if fault := _not_ours(place, directory=place in (folder.parent, folder)):
            return f"{place} {fault}"
    if path.lstat().st_size > MARKER_LIMIT_BYTES:
        return f"{path} is no marker"
    try:
        marker = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return f"{path} is no marker"
    if not isinstance(marker, dict) or marker.get("version") != MARKER_VERSION:
        return f"{path} is the marker of another release"
    for name, value in asdict(origin).items():
        if marker.get(name) != value:
            return f"{path} names another {name.replace('_', ' ')}"
    for name, size in (("graph_bytes", graph.lstat().st_size), ("data_bytes", data.lstat().st_size)):
        if marker.get(name) != size:
            return f"a file in {folder} has {size} bytes, but {MARKER_NAME} says {marker.get(name)}"
    if any(marker.get(name) != value for name, value in _describe(graph, data).items()):
        return f"a file in {folder} is damaged"
    return ""


def _describe(graph: Path, data: Path) -> dict[str, int | str]:
    """Sizes, the graph's digest, and a digest of pages spread over the data."""
    size = data.stat().st_size
    sampled = hashlib.sha256()
    with data.open("rb", buffering=0) as file:
        for index in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            sampled.update(file.read(SAMPLE_BYTES))
    return {
        "graph_bytes": graph.stat().st_size,
        "graph_sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "data_bytes": size,
        "data_sampled_sha256": sampled.hexdigest(),
    }


def _not_ours(path: Path, *, directory: bool) -> str:
    """What is wrong with a file or folder that should be the user's own; "" if nothing is."""
    status = path.lstat()
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(status.st_mode):
        return f"is not a plain {'folder' if directory else 'file'}"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return "can be written by another user"
    return ""


def _discard(path: Path) -> None:
    """Delete a folder, a file or a link, whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _watched(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` now and then, in another thread."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(_WATCH_SECONDS):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@contextmanager
def _locked(path: Path, tell: Tell) -> Iterator[None]:
    """Hold a lock that ends with this process, waiting for another that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open("ab") as file:
        if not try_lock(file.fileno()):
            tell.say(f"Another process is preparing these weights; waiting for it ({path})")
            while not try_lock(file.fileno()):
                threading.Event().wait(_WATCH_SECONDS)
        yield  # closing the file frees the lock


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
