"""A file of requests over a Ray cluster: Ray Data hands out pieces, actors with an engine each answer them.

    driver: Source ─ Feeder (actor beside the driver) ─ line by line ─→ AnsweringActor: engine ─┐
    driver: output file ←─ answered pieces ─────────────── Ray Data ────────────────────────────┘

In: lines of a source. Out: answered lines, as pieces are finished. Knows nothing of the output file: only the
driver writes, and it takes every line once, so a piece that is answered again does no harm.

Ray Data sees numbers of pieces only. A worker that dies is started again, and its piece is given out again.
The lines themselves are fetched when they are answered, so no file lies in the cluster's memory, and only the
driver's machine must see it. The bundle must lie under the same path on all machines.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import tempfile
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import DependencyError, DeviceError, EdgeError
from autoglm_edge.offline.answers import answer_lines
from autoglm_edge.offline.job import Rules
from autoglm_edge.offline.record import Answered
from autoglm_edge.offline.source import Line, Source, read_line
from autoglm_edge.runtime.opening import Opening
from autoglm_edge.server.work.answering import ServedEngine

PIECE_LINES = 64
"""Lines of a piece at most: what is lost with a worker, and at whose end slots stand empty."""
PIECES_PER_WORKER = 16
"""At least, where there are lines enough: so that no worker is left with a large piece at the end."""
MOST_PIECES = 20_000
"""Ray Data keeps track of each; a file of millions of lines has larger ones."""
RETRIES = 3
"""Of a piece whose worker died: one that kills every worker must end the run."""
_OURS = re.compile(r"autoglm_edge\.errors\.\w+: (.+)")
_ANY = re.compile(r"^\S*(?:Error|Exception): .+", re.MULTILINE)
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
STORE_BYTES = 256 << 20
"""Memory for what lies between processes of a cluster of this machine: a few lines and answers."""


@dataclass(frozen=True)
class Cluster:
    """Where lines are answered.

    Attributes:
        opening: of the engine, in each worker; without a number of threads it takes its part of the CPUs.
        rules: what requests may ask for.
        address: of a cluster that runs; None begins one on this machine, which nobody else can reach.
        workers: engines; None is one per GPU, or without GPUs one per machine.
    """

    opening: Opening
    rules: Rules
    address: str | None = None
    workers: int | None = None

    def answer_lines(self, source: Source, indices: Sequence[int]) -> Generator[Answered, None, None]:
        """Answer lines of a source.

        Args:
            source: of the driver's machine.
            indices: of requests, from 0.

        Returns:
            What stands in the output, piece by piece as they are finished.

        Raises:
            DeviceError: there is no cluster, or it is too small.
            EdgeError: it gave up.
        """
        with _connected(self.address) as ray:
            workers, cpus = self._share(ray)
            length = piece_length(len(indices), workers)
            pieces = -(-len(indices) // length)
            try:
                feeder = _feeder(ray, source, indices)
                # Made here: tasks that read would wait for CPUs, which the engines have.
                numbers = ray.data.from_items(list(range(pieces)), override_num_blocks=pieces)
                answered = numbers.map_batches(
                    AnsweringActor,
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                    fn_constructor_args=(self._opening(cpus), self.rules, feeder, length, len(indices)),
                    num_cpus=cpus,
                    num_gpus=1 if self.opening.session.device == "cuda" else 0,
                )
                for batch in answered.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                    yield from _records(batch)
            except ray.exceptions.RayError as error:
                raise EdgeError(
                    f"the cluster gave up ({_reason(error)}); the same command goes on with what is missing"
                ) from error

    def _share(self, ray: Any) -> tuple[int, int]:
        """Number of workers, and CPUs of each.

        Raises:
            DeviceError: the cluster has not enough of something.
        """
        found = ray.cluster_resources()
        cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        cuda = self.opening.session.device == "cuda"
        machines = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0))
        workers = self.workers or (gpus if cuda else machines)
        if cuda and gpus < max(1, workers):
            raise DeviceError(
                f"{workers} workers need a GPU each, and the cluster has {gpus}; use fewer --workers"
            )
        if cpus < max(1, workers):
            raise DeviceError(
                f"{workers} workers need a CPU each, and the cluster has {cpus}; use fewer --workers"
            )
        # A worker stands on one machine: more CPUs than the smallest share of any would never be found.
        return workers, min(max(1, self.opening.session.threads or cpus // workers), cpus // workers)

    def _opening(self, cpus: int) -> Opening:
        threads = self.opening.session.threads or cpus
        bundle = self.opening.bundle.resolve()
        return replace(self.opening, bundle=bundle, session=replace(self.opening.session, threads=threads))


def piece_length(lines: int, workers: int) -> int:
    """Lines of a piece: few enough that all workers are busy to the end, and not too many to lose."""
    return max(1, min(PIECE_LINES, lines // (workers * PIECES_PER_WORKER)), -(-lines // MOST_PIECES))


class Feeder:
    """Gives out lines of the file; an actor on the driver's machine."""

    def __init__(self, path: str, longest: int, numbers: bytes, offsets: bytes) -> None:
        """Nothing is read yet.

        Args:
            path: of the file.
            longest: as in `Source`.
            numbers: 64-bit integers: of the lines that are to be answered.
            offsets: the same for where they begin.
        """
        self._path = Path(path)
        self._longest = longest
        self._numbers, self._offsets = array("Q", numbers), array("Q", offsets)
        self._given = bytearray(len(self._numbers))

    def line(self, place: int) -> tuple[int, bytes | None]:
        """Number and bytes of a line, given by its place among those that are to be answered.

        Raises:
            EdgeError: its worker died too often. Ray itself would try for ever.
        """
        if self._given[place] > RETRIES:
            raise EdgeError(
                f"the worker with line {self._numbers[place]}, or one near to it, died {RETRIES + 1} times"
            )
        self._given[place] += 1
        with self._path.open("rb") as file:
            line = read_line(file, self._numbers[place], self._offsets[place], self._longest)
        return line.number, line.data


class AnsweringActor:
    """One engine; answers one piece of the file after the other."""

    def __init__(self, opening: Opening, rules: Rules, feeder: Any, length: int, lines: int) -> None:
        """Nothing is loaded yet: where that fails, the first piece says so.

        Args:
            opening: of the engine.
            rules: what requests may ask for.
            feeder: gives out lines.
            length: lines of a piece.
            lines: in all.
        """
        self._opening = opening
        self._engine: ServedEngine | None = None
        self._rules = rules
        self._feeder = feeder
        self._length = length
        self._lines = lines

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Answer pieces.

        Args:
            batch: numbers of pieces, (N,) by "item".

        Returns:
            The fields of `Answered`, (n,) each.

        Raises:
            EdgeError: the engine cannot be loaded.
        """
        if self._engine is None:
            self._engine = self._opening.open(ServedEngine)
        found: list[Answered] = []
        for piece in batch["item"].tolist():
            found += answer_lines(self._engine, self._rules, self._fetch(int(piece)))
        records = np.empty(len(found), object)
        records[:] = [item.record for item in found]
        return {
            "number": np.array([item.number for item in found], np.int64),
            "record": records,
            "status": np.array([item.status for item in found], np.int64),
            "tokens": np.array([item.tokens for item in found], np.int64),
        }

    def _fetch(self, piece: int) -> Iterator[Line]:
        import ray

        begin = piece * self._length
        for place in range(begin, min(begin + self._length, self._lines)):
            number, data = ray.get(self._feeder.line.remote(place))
            yield Line(number, data)


def _feeder(ray: Any, source: Source, indices: Sequence[int]) -> Any:
    """A feeder on this machine, also where the cluster has others."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    places = [source.offset(index) for index in indices]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Feeder)
    return actor.options(scheduling_strategy=here).remote(
        str(source.path.resolve()),
        source.longest,
        array("Q", (number for number, _ in places)).tobytes(),
        array("Q", (offset for _, offset in places)).tobytes(),
    )


def _records(batch: dict[str, NDArray[Any]]) -> Iterator[Answered]:
    columns = (batch[name].tolist() for name in ("number", "record", "status", "tokens"))
    for number, record, status, tokens in zip(*columns, strict=True):
        yield Answered(int(number), bytes(record), int(status), int(tokens))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Be part of a cluster; one that is begun here ends with the block. Gives the package.

    Raises:
        DeviceError: there is none at that address, or none can be begun.
    """
    # Ray reads these when it is imported: nobody is told that it runs, and its own notes are not shown.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    if address is None:
        # Its switch for systems whose firewalls ask: it then listens on 127.0.0.1, and not on all addresses.
        # Whoever else is on this machine has no token.
        token = secrets.token_hex(32)
        os.environ |= {_LOOPBACK: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"a cluster needs the package {error.name}, which is not installed; "
            'run pip install "autoglm-edge[ray]"'
        ) from error
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    folder: str | None = None
    if address is None:
        folder = tempfile.mkdtemp(prefix="autoglm-ray-")  # short: sockets lie in it
        quiet |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": folder,
        }
    else:
        quiet["address"] = address
    try:
        try:
            ray.init(**quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = "on this machine" if address is None else f"at {address}"
            raise DeviceError(
                f"there is no Ray cluster {where} ({_reason(error)}); give the address of one with --ray, "
                "or --ray without an address to begin one here"
            ) from error
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = False
        try:
            if address is None:
                _check_loopback(ray)
            yield ray
        finally:
            ray.shutdown()
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_loopback(ray: Any) -> None:
    """Nobody but this machine may reach the cluster that was begun: whoever does can run programs in it.

    Raises:
        DeviceError: somebody may.
    """
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {"127.0.0.1"}:
        raise DeviceError(
            f"Ray was loaded before and would listen on {', '.join(sorted(addresses))}; set {_LOOPBACK}=0 "
            "before it is imported"
        )


def _reason(error: BaseException) -> str:
    """The line of a long trace that says what happened: an error of ours, or else of whomever."""
    text = str(error)
    found = _OURS.findall(text) or _ANY.findall(text) or text.splitlines()[-1:] or [type(error).__name__]
    said = str(found[-1]).strip()
    return said if len(said) <= 300 else f"{said[:297]}..."
