"""What an export will write, need and take: sizes to the byte, memory and time as estimates, nothing written.

In: a `Job`. Out: an `Estimate`. Sizes are sums over the plans and over the very bytes of the small files;
time comes from a trial of the number formats on this machine. Knows nothing of how the weights are stored in
the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoglm_edge.quantize.channels import ChannelFormat, WeightFormat, quantize_channels
from autoglm_edge.quantize.gptq import GptqFactor, Panel, gptq_rows
from autoglm_edge.quantize.refine import search_rows
from autoglm_edge.quantize.rounding import quantize_rows
from autoglm_edge.quantize.rule import REFINEMENTS, Refinement
from autoglm_edge.runtime.machine.limits import anonymous_bytes
from autoglm_edge.runtime.machine.topology import usable_cores
from autoglm_edge.runtime.manifest import MANIFEST_NAME

from .calibrate.calibration_cost import calibration_bytes, calibration_operations
from .calibrate.kv_scales import kv_bytes, kv_operations
from .card import readable
from .contents import Job, build_manifest, small_files
from .graphs.links import channel_links
from .graphs.plan import PartPlan, Weight
from .source.shapes import expected_tensors
from .staging import MARGIN_BYTES, Staging, nearest_folder
from .weights.balance import largest, scan_bytes
from .weights.writer import in_flight_bytes

TRIAL_ROWS, TRIAL_COLUMNS = 512, 4096
TRIAL_REPEATS = 2
SHORT_CONTEXT = 4096


@dataclass(frozen=True)
class PartEstimate:
    """One part of the bundle.

    Attributes:
        name: decoder, embedding, vision or prefill.
        graph_bytes: of the graph file.
        data_bytes: of the data file, padding between pieces included.
        weight_bytes: of the weights in it.
    """

    name: str
    graph_bytes: int
    data_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What an export comes to.

    Attributes:
        model: hub id or folder name of the checkpoint.
        recipe: name of the recipe.
        activations: "float32" or "float16".
        parts: decoder, embedding, vision, and prefill if there is one.
        other_bytes: of tokenizer, template, configuration, card and manifest.
        total_bytes: of the whole bundle, exact.
        source_bytes: of the checkpoint's tensors.
        free_bytes: on the disk of the output.
        fits: whether the disk has room for it.
        missing_bytes: still needed on that disk: the bundle and a margin, less what an interrupted export
            has there already.
        peak_anonymous_bytes: memory that the export itself needs, at most; mapped files not counted.
        seconds: that calibrating, converting and hashing take on this machine, if the disks keep up.
        refinement: the most that is done for any weight: "none", "search" or "gptq".
        calibration_prompts: that are run through the float model for it; 0 without gptq.
        calibration_tokens: of all of them.
        kv_dtype: what the KV cache holds: "float32", "float16" or "int8".
        kv_calibration_prompts: that are run through the float model for the scales of an int8 cache.
        kv_calibration_tokens: of all of them.
        weights_mapped_bytes: at run time, clean pages that the system can drop and read again.
        weights_copied_bytes: at run time on a CPU, at most: weights that onnxruntime copies into an order of
            its own when it loads them; these cannot be dropped.
        kv_bytes_per_token: what a token adds to the KV cache.
        kv_bytes_at_4096: KV cache of 4,096 tokens.
        kv_bytes_at_full_context: KV cache of the longest context.
        context_length: the longest context, in tokens.
    """

    model: str
    recipe: str
    activations: str
    parts: tuple[PartEstimate, ...]
    other_bytes: int
    total_bytes: int
    source_bytes: int
    free_bytes: int
    fits: bool
    missing_bytes: int
    peak_anonymous_bytes: int
    seconds: float
    refinement: Refinement
    calibration_prompts: int
    calibration_tokens: int
    kv_dtype: str
    kv_calibration_prompts: int
    kv_calibration_tokens: int
    weights_mapped_bytes: int
    weights_copied_bytes: int
    kv_bytes_per_token: int
    kv_bytes_at_4096: int
    kv_bytes_at_full_context: int
    context_length: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """One document, on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_table(self) -> str:
        """Lines for people."""
        rows = [(f"{part.name}", readable(part.graph_bytes + part.data_bytes)) for part in self.parts]
        room = "enough" if self.fits else f"NOT ENOUGH, {readable(self.missing_bytes)} needed"
        rows += [
            ("other files", readable(self.other_bytes)),
            ("bundle", f"{readable(self.total_bytes)} ({self.total_bytes:,} bytes)"),
            ("checkpoint", readable(self.source_bytes)),
            ("free on disk", f"{readable(self.free_bytes)}, {room}"),
            (
                "export takes",
                f"about {_duration(self.seconds)}, {readable(self.peak_anonymous_bytes)} of memory",
            ),
            *self._refined(),
            ("weights in use", f"{readable(self.weights_mapped_bytes)} mapped"),
            ("", f"up to {readable(self.weights_copied_bytes)} copied by onnxruntime's CPU kernels"),
            ("KV cache", f"{self.kv_dtype}, {readable(self.kv_bytes_per_token)} per token"),
        ]
        if self.context_length > SHORT_CONTEXT:
            rows.append(("", f"{readable(self.kv_bytes_at_4096)} at {SHORT_CONTEXT:,} tokens"))
        rows.append(("", f"{readable(self.kv_bytes_at_full_context)} at {self.context_length:,} tokens"))
        head = f"{self.model} as {self.recipe}, {self.activations} activations"
        return "\n".join([head, *(f"  {label:<16}{value}" for label, value in rows)])

    def _refined(self) -> list[tuple[str, str]]:
        """What the time goes into, if into more than rounding."""
        rows = []
        if self.refinement == "search":
            rows.append(("", "a search for the scales included"))
        elif self.refinement == "gptq":
            prompts = f"{self.calibration_prompts:,} prompts"
            rows.append(("", f"calibration on {prompts}, {self.calibration_tokens:,} tokens, included"))
        if self.kv_calibration_prompts:
            prompts = f"{self.kv_calibration_prompts:,} prompts"
            rows.append(
                ("", f"scales of the cache on {prompts}, {self.kv_calibration_tokens:,} tokens, included")
            )
        return rows


def estimate_job(job: Job, output: Path) -> Estimate:
    """Estimate an export.

    Args:
        job: what would be exported.
        output: where to; only the free space of its disk is looked at, and what an interrupted export left.
    """
    small = {name: len(content) for name, content in small_files(job).items()}
    unknown = "0" * 64  # digests differ in value, not in length
    files = {name: (size, unknown) for name, size in small.items()}
    files.update({plan.data_file: (plan.data_bytes, unknown) for plan in job.plans})
    small[MANIFEST_NAME] = len(build_manifest(job, files).to_json().encode())
    graph_bytes = sum(small[plan.graph_file] for plan in job.plans)
    small_bytes = sum(small.values())
    total_bytes = job.data_bytes + small_bytes
    free_bytes = shutil.disk_usage(nearest_folder(output)).free
    missing_bytes = max(0, total_bytes + MARGIN_BYTES - Staging(output).allocated_bytes)
    workers = usable_cores()
    tensors = job.checkpoint.tensors
    rows = job.rows()
    working = max(in_flight_bytes(plan, rows, workers) for plan in job.plans)
    if job.recipe.balance:
        working += scan_bytes(workers)
    samples, calibrated = job.calibration, _calibrated(job)
    calibrating = calibration_bytes(job.config, samples, calibrated) if samples else 0
    if job.kv_calibration is not None:
        calibrating = max(calibrating, kv_bytes(job.config, job.kv_calibration))
    refinements = [weight.refine for plan in job.plans for weight in plan.weights]
    kv, measured = job.kv_bytes_per_token, job.kv_calibration
    context = job.config.text.context_length
    return Estimate(
        model=job.config.source,
        recipe=job.recipe.name,
        activations=job.recipe.activations,
        parts=tuple(
            PartEstimate(plan.name, small[plan.graph_file], plan.data_bytes, plan.weight_bytes)
            for plan in job.plans
        ),
        other_bytes=small_bytes - graph_bytes,
        total_bytes=total_bytes,
        source_bytes=tensors.size_bytes,
        free_bytes=free_bytes,
        fits=missing_bytes <= free_bytes,
        missing_bytes=missing_bytes,
        peak_anonymous_bytes=_process_bytes() + 2 * working + small_bytes + calibrating,
        seconds=expected_seconds(job, workers),
        refinement=max(refinements, key=REFINEMENTS.index),
        calibration_prompts=len(samples.samples) if samples else 0,
        calibration_tokens=samples.tokens if samples else 0,
        kv_dtype=job.kv_dtype,
        kv_calibration_prompts=len(measured.samples) if measured else 0,
        kv_calibration_tokens=measured.tokens if measured else 0,
        weights_mapped_bytes=job.data_bytes,
        weights_copied_bytes=sum(_copied_bytes(plan) for plan in job.plans),
        kv_bytes_per_token=kv,
        kv_bytes_at_4096=SHORT_CONTEXT * kv,
        kv_bytes_at_full_context=context * kv,
        context_length=context,
    )


def expected_seconds(job: Job, workers: int) -> float:
    """Time for all weights and their digests, from a trial on this machine with that many threads."""
    values: Counter[tuple[WeightFormat | str, Refinement]] = Counter()
    for plan in job.plans:
        for weight in plan.weights:
            values[weight.quant or weight.action, weight.refine] += weight.rows * weight.columns
    if job.recipe.balance:
        shapes = expected_tensors(job.config)
        for link in channel_links(job.config):
            channels = shapes[link.readers[0]][1]
            read = channels * math.prod(shapes[link.source][1:])  # rows that make the channels
            read += sum(math.prod(shapes[name]) for name in link.readers)
            values["balance", "none"] += read
    seconds = sum(count / values_per_second(*kind, workers) for kind, count in values.items())
    if job.calibration is not None:
        operations = calibration_operations(job.config, job.calibration, _calibrated(job))
        seconds += operations / operations_per_second()
    if job.kv_calibration is not None:
        seconds += kv_operations(job.config, job.kv_calibration) / operations_per_second()
    return seconds + job.data_bytes / hashed_per_second()


def values_per_second(kind: WeightFormat | str, refine: Refinement, workers: int) -> float:
    """Weights per second that this machine takes from bfloat16 to a format, all in memory.

    Args:
        kind: a number format, "copy" or "transpose"; "balance" is the look at all weights before that.
        refine: how integers are chosen; without the calibration that it may need.
        workers: threads at work.
    """
    shape = (TRIAL_ROWS, TRIAL_COLUMNS)
    stored = (np.random.default_rng(0).standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    nothing = _factor_of_nothing(TRIAL_COLUMNS if refine == "gptq" else 1)

    def once(_: int) -> None:
        rows = (stored.astype(np.uint32) << 16).view(np.float32)
        if isinstance(kind, ChannelFormat):
            turned = quantize_channels(
                rows, ChannelFormat(), refine="search" if refine == "search" else "none"
            )
            np.ascontiguousarray(turned.data.T)
        elif not isinstance(kind, str):
            if refine == "search":
                search_rows(rows, kind)
            elif refine == "gptq":
                gptq_rows(rows, kind, nothing)
            else:
                quantize_rows(rows, kind)
        elif kind == "transpose":
            np.ascontiguousarray(rows.T)
        elif kind == "balance":
            largest(rows, axis=0)
        else:
            rows.copy()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(once, range(workers)))  # the first time pays for new memory
        start = time.perf_counter()
        list(pool.map(once, range(workers * TRIAL_REPEATS)))
        seconds = time.perf_counter() - start
    return workers * TRIAL_REPEATS * stored.size / max(seconds, 1e-9)


def operations_per_second() -> float:
    """Multiplications and additions per second of a float32 matrix product, all cores at work."""
    one, other = np.ones((TRIAL_ROWS, TRIAL_COLUMNS), np.float32), np.ones((TRIAL_COLUMNS, 1024), np.float32)
    one[:16] @ other  # the first time starts threads
    start = time.perf_counter()
    one @ other
    return 2 * TRIAL_ROWS * TRIAL_COLUMNS * 1024 / max(time.perf_counter() - start, 1e-9)


def hashed_per_second() -> float:
    """Bytes per second of SHA-256 on one core, as the export computes it."""
    block = bytes(TRIAL_ROWS * TRIAL_COLUMNS)
    start = time.perf_counter()
    hashlib.sha256(block)
    return len(block) / max(time.perf_counter() - start, 1e-9)


def _calibrated(job: Job) -> list[Weight]:
    return [weight for plan in job.plans for weight in plan.weights if weight.refine == "gptq"]


def _factor_of_nothing(columns: int) -> GptqFactor:
    """As much work as a real one."""
    panel = Panel(np.arange(columns, dtype=np.intp), np.zeros((columns, columns), np.float32))
    return GptqFactor((panel,), np.ones(columns, np.float32))


def _copied_bytes(plan: PartPlan) -> int:
    """Weights of matrix products that are packed at load, at most.

    The table of the embedding is only looked up, and the prefill graph is opened unpacked: both stay mapped.
    """
    if plan.name in ("embedding", "prefill"):
        return 0
    return sum(weight.size_bytes for weight in plan.weights if weight.action != "copy")


def _process_bytes() -> int:
    """Anonymous memory of this process as it is now; elsewhere than on Linux, its peak of all memory."""
    known = anonymous_bytes()
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min"
