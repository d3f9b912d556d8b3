"""Writes the data file of a part: checkpoint rows in, final bytes out, a few megabytes at a time.

In: a `PartPlan`, the checkpoint's tensors, a `Quantizer`, and which weights are on disk already. Out: the
data file, and a call for every batch of weights that has reached the disk. Knows nothing of recipes, graphs
or bundles.

Rows are independent of each other in every number format, so a weight is cut into chunks of rows, which a
thread pool reads, converts and writes at their final offsets, in any order. The bytes do not depend on the
number of threads. Memory in use is the chunks being worked on, whatever the size of a tensor, and what the
quantizer holds.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import ExportError, QuantError
from autoglm_edge.export.calibrate.gram import PANEL
from autoglm_edge.export.graphs.plan import PartPlan, Piece, Weight
from autoglm_edge.quantize.channels import ChannelFormat, QuantizedChannels
from autoglm_edge.quantize.formats import BlockFormat
from autoglm_edge.quantize.gptq import TILE_ROWS
from autoglm_edge.runtime.machine.topology import usable_cores

from .quantizer import Quantizer, RecipeQuantizer, RowsToIntegers
from .rows import Rows, read_rows, source_matrix

BUDGET_BYTES = 32 << 20
"""Float32 values that all threads together hold; the integers made of them come on top."""

CHUNK_BYTES = (1 << 20, 4 << 20)
"""Least and most float32 bytes of a chunk. Small chunks stay in the cache between reading and quantizing."""

TALL_CHUNK_BYTES = (2 << 20, 32 << 20)
"""The same for a weight that is turned, where every column of a chunk is a write of its own: taller is
faster."""

SYNC_BYTES = 128 << 20
"""Bytes written between two flushes; so much work is repeated, at most, after a power cut."""

BAND_ROWS = 16
"""Rows turned at once in a transposition, a cache line of float32. Measured: half the time of a plain
transposed copy, less than with square tiles, and a third for bytes."""

FLOAT16_MAX = 65504.0
ROUNDS_TO_INF = {"float32": math.inf, "float16": 65520.0}
"""Magnitude from which on a value becomes inf: for float16, half a step above its largest number."""

_fdatasync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class Chunk:
    """Rows start..stop of one weight, counted from its own first one.

    Attributes:
        weight: of the plan.
        start: first row.
        stop: the row after the last.
        last: whether these are the weight's last.
        to_integers: makes integers of them, if it is to be quantized.
    """

    weight: Weight
    start: int
    stop: int
    last: bool
    to_integers: RowsToIntegers | None


def chunk_rows(weight: Weight, rows: int, columns: int, workers: int) -> int:
    """Rows per chunk of a (rows, columns) tensor when `workers` chunks are in memory at once."""
    if weight.refine == "gptq":
        return min(rows, TILE_ROWS)  # fewer would be as much work
    least, most = TALL_CHUNK_BYTES if weight.is_turned else CHUNK_BYTES
    budget = min(max(BUDGET_BYTES // workers, least), most)
    return min(rows, max(1, budget // (4 * columns)))


def in_flight_bytes(plan: PartPlan, store: Rows, workers: int) -> int:
    """Bytes of the chunks that are in memory at once: float32 values, and the pieces made of them.

    Weights refined by gptq are made out of a second set of pieces, on four times the values of a panel.
    """
    largest = 0
    for weight in plan.weights:
        rows, columns = source_matrix(weight, store.shape(weight.source))
        count = chunk_rows(weight, rows, columns, workers)
        made = math.ceil(sum(piece.size_bytes for piece in weight.pieces) * count / rows)
        if isinstance(weight.quant, ChannelFormat):
            made += made  # row by row, and turned
        if weight.refine == "gptq":
            made += made + 16 * TILE_ROWS * min(columns, PANEL)
        largest = max(largest, 4 * count * columns + made)
    return workers * largest


def write_part(
    plan: PartPlan,
    store: Rows,
    path: Path,
    *,
    quantizer: Quantizer | None = None,
    finished: Collection[str] = (),
    record: Callable[[list[str]], None] | None = None,
    advance: Callable[[Weight, int], None] | None = None,
    workers: int | None = None,
) -> None:
    """Write a part's data file, or what is missing of it.

    Args:
        plan: what to write where.
        store: where the values come from.
        path: the data file; made if absent, set to its final size at once.
        quantizer: makes integers; without one, refinements by calibration are refused.
        finished: first piece name of the weights that are in the file already.
        record: called, from another thread but never twice at once, with first piece names of weights whose
            bytes have reached the disk.
        advance: called from this thread with a weight and the bytes that were written of it.
        workers: threads; the usable cores by default.

    Raises:
        ExportError: plan and checkpoint disagree, or a value does not fit the dtype it is to be stored in.
        QuantError: a value cannot be quantized.
        OSError: the disk is full or fails.
    """
    count = workers or usable_cores()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        if not finished:
            os.ftruncate(handle, 0)  # so that the gaps between pieces are zeros whatever was here before
        os.ftruncate(handle, plan.data_bytes)
        with ThreadPoolExecutor(count, "export") as pool, ThreadPoolExecutor(1, "flush") as flusher:
            flush = _Flush(handle, flusher, record)
            pending: deque[tuple[Chunk, Future[None]]] = deque()
            try:
                for chunk in _chunks(plan, store, finished, count, quantizer or RecipeQuantizer()):
                    pending.append((chunk, pool.submit(_write_chunk, handle, store, chunk)))
                    if len(pending) >= 4 * count:
                        _settle(*pending.popleft(), store, flush, advance)
                while pending:
                    _settle(*pending.popleft(), store, flush, advance)
                flush.everything()
            except BaseException:
                # Nothing may write once the file is closed; what is finished is still worth recording.
                pool.shutdown(cancel_futures=True)
                flush.quietly()
                raise
    finally:
        os.close(handle)


def _chunks(
    plan: PartPlan, store: Rows, finished: Collection[str], workers: int, quantizer: Quantizer
) -> Iterator[Chunk]:
    """All chunks to be written, in the order of the data file."""
    for weight in plan.weights:
        if weight.pieces[0].name in finished:
            continue
        rows, columns = source_matrix(weight, store.shape(weight.source))
        step = chunk_rows(weight, rows, columns, workers)
        to_integers = quantizer.prepare(weight) if weight.action == "quantize" else None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Chunk(weight, start, stop, stop == rows, to_integers)


def _settle(
    chunk: Chunk,
    future: Future[None],
    store: Rows,
    flush: _Flush,
    advance: Callable[[Weight, int], None] | None,
) -> None:
    """Wait for a chunk; after a weight's last one (they come in order), let go of the weight."""
    future.result()
    rows, _ = source_matrix(chunk.weight, store.shape(chunk.weight.source))
    total = sum(piece.size_bytes for piece in chunk.weight.pieces)
    written = total * chunk.stop // rows - total * chunk.start // rows
    if chunk.last:
        store.release(chunk.weight.source)
    flush.add(written, chunk.weight.pieces[0].name if chunk.last else None)
    if advance is not None:
        advance(chunk.weight, written)


class _Flush:
    """Brings finished weights to the disk in batches, beside the work, so that dirty pages do not pile up."""

    def __init__(
        self, handle: int, thread: ThreadPoolExecutor, record: Callable[[list[str]], None] | None
    ) -> None:
        self.handle, self.thread, self.record = handle, thread, record
        self.names: list[str] = []
        self.dirty_bytes = 0
        self.running: Future[None] | None = None

    def add(self, written_bytes: int, finished: str | None) -> None:
        """Note what was written; start a flush when it is time for one."""
        self.dirty_bytes += written_bytes
        if finished is not None:
            self.names.append(finished)
        if self.dirty_bytes >= SYNC_BYTES:
            self._start()

    def everything(self) -> None:
        """Flush what is left and wait."""
        self._start()
        self._wait()

    def quietly(self) -> None:
        """The same on the way out of an error, which must not be hidden by another one."""
        try:
            self.everything()
        except OSError:
            self.names = []

    def _start(self) -> None:
        self._wait()
        if self.dirty_bytes or self.names:
            self.running = self.thread.submit(self._run, self.names)
            self.names, self.dirty_bytes = [], 0

    def _wait(self) -> None:
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def _run(self, names: list[str]) -> None:
        _fdatasync(self.handle)
        if names and self.record is not None:
            self.record(names)


def _write_chunk(handle: int, store: Rows, chunk: Chunk) -> None:
    weight, start, stop = chunk.weight, chunk.start, chunk.stop
    values = read_rows(store, weight, start, stop)
    if weight.action == "copy":
        (piece,) = weight.pieces
        stored = _cast(values, piece, weight, start)
        _write(handle, stored, piece.offset + start * values.shape[1] * stored.itemsize)
    elif weight.action == "transpose":
        (piece,) = weight.pieces
        _write_columns(handle, _cast(values, piece, weight, start), piece, weight.rows, start)
    else:
        _write_quantized(handle, values, chunk)


def _write_quantized(handle: int, values: NDArray[np.float32], chunk: Chunk) -> None:
    """Quantize rows; each piece has a fixed number of bytes per row, so they land in one run per piece."""
    weight, start, fmt, to_integers = chunk.weight, chunk.start, chunk.weight.quant, chunk.to_integers
    if fmt is None or to_integers is None:
        raise ExportError(f"the plan for {weight.source} says quantize, but names no format")
    try:
        made = to_integers(values)
    except QuantError as error:
        first = weight.first_row + start
        raise QuantError(
            f"{weight.source}, counted from row {first} of rows {first} to {first + len(values)}: {error}"
        ) from error
    if isinstance(made, QuantizedChannels):
        _write_channels(handle, made, chunk)
        return
    if not isinstance(fmt, BlockFormat):
        raise ExportError(f"the plan for {weight.source} wants {fmt}, and got integers in blocks")
    data = made.data.reshape(len(values), -1)
    unpadded = -(-weight.columns * fmt.field_bits // 8)
    if weight.pieces[0].size_bytes == weight.rows * unpadded:
        data = data[
            :, :unpadded
        ]  # a table for GatherBlockQuantized, which wants no padding in the last block
    arrays: list[NDArray[Any]] = [data, made.scales]
    if made.zero_points is not None:
        arrays.append(made.zero_points)
    if len(arrays) != len(weight.pieces):
        raise ExportError(
            f"the plan for {weight.source} has {len(weight.pieces)} pieces, its format {len(arrays)}"
        )
    for piece, array in zip(weight.pieces, arrays, strict=True):
        row_bytes = piece.size_bytes // weight.rows
        if array.nbytes != row_bytes * len(values) or array.dtype != piece.dtype:
            raise ExportError(
                f"{piece.name} should have {row_bytes} bytes of {piece.dtype} per row, the format gives "
                f"{array.nbytes // len(values)} of {array.dtype}"
            )
        _write(handle, array, piece.offset + start * row_bytes)


def _write_channels(handle: int, made: QuantizedChannels, chunk: Chunk) -> None:
    """Write integers with a scale per channel: each group of columns is a matrix of its own, turned."""
    weight, groups = chunk.weight, made.scales.shape[1]
    if len(weight.pieces) != 2 * groups:
        raise ExportError(
            f"the plan for {weight.source} has {len(weight.pieces)} pieces, its format {2 * groups}"
        )
    width = made.data.shape[1] // groups
    for group in range(groups):
        data, scales = weight.pieces[2 * group : 2 * group + 2]
        integers, own = made.data[:, group * width : (group + 1) * width], made.scales[:, group]
        for piece, array, shape in ((data, integers, (width, weight.rows)), (scales, own, (weight.rows,))):
            if piece.shape != shape or piece.dtype != array.dtype:
                raise ExportError(
                    f"{piece.name} should be {piece.dtype} {piece.shape}, the format gives {array.dtype} "
                    f"{shape}"
                )
        _write_columns(handle, integers, data, weight.rows, chunk.start)
        _write(handle, own, scales.offset + chunk.start * own.itemsize)


def _write_columns(handle: int, values: NDArray[Any], piece: Piece, rows: int, start: int) -> None:
    """Write (n, columns) values as rows start..start+n of a piece stored as (columns, rows)."""
    turned = _transposed(values)
    if len(values) == rows:  # the whole tensor: one run
        _write(handle, turned, piece.offset)
        return
    view = turned.data.cast("B")
    run = len(values) * values.itemsize
    place = piece.offset + start * values.itemsize
    for begin in range(0, len(view), run):
        _write_bytes(handle, view[begin : begin + run], place)
        place += rows * values.itemsize


def _transposed(values: NDArray[Any]) -> NDArray[Any]:
    """A contiguous transposed copy, made in bands: a plain copy misses the cache on every value."""
    rows, columns = values.shape
    out = np.empty((columns, rows), values.dtype)
    # As integers of the same size: numpy moves float16 one by one.
    integers = f"u{values.itemsize}"
    source, target = values.view(integers), out.view(integers)
    for row in range(0, rows, BAND_ROWS):
        target[:, row : row + BAND_ROWS] = source[row : row + BAND_ROWS].T
    return out


def _cast(values: NDArray[np.float32], piece: Piece, weight: Weight, start: int) -> NDArray[Any]:
    """To the stored dtype; refuses what would come back as inf, and what is no number in the first place."""
    limit = ROUNDS_TO_INF[piece.dtype]
    if not (values.max(initial=0) < limit and values.min(initial=0) > -limit):  # also fails on nan
        row, column = (int(index) for index in np.argwhere(~(np.abs(values) < limit))[0])
        value = float(values[row, column])
        row += weight.first_row + start
        where = f"{weight.source} holds {value:.6g} at row {row}, column {column}"
        if math.isfinite(value):
            raise ExportError(
                f"{where}, beyond the {FLOAT16_MAX:.0f} of float16; export with float32 activations"
            )
        raise ExportError(f"{where}, which is no weight; the checkpoint is damaged")
    stored: NDArray[Any] = values.astype(piece.dtype, copy=False)
    return stored


def _write(handle: int, array: NDArray[Any], offset: int) -> None:
    _write_bytes(handle, np.ascontiguousarray(array).data.cast("B"), offset)


def _write_bytes(handle: int, view: memoryview, offset: int) -> None:
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done
