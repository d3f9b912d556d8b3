"""From a checkpoint to a bundle, in steps that survive a crash.

In: a checkpoint, a recipe, an output path. Out: a bundle there, or an error and nothing there. Decides the
order of things; how a graph looks, how a tensor is read or quantized, and what a manifest holds is decided
elsewhere.

    checkpoint ─► recipe ─► a plan per part ─► calibration set ─► checks (names, output, lock, disk)
        ─► data files ─► graphs and small files ─► SHA-256 of all ─► manifest.json ─► rename

Weights that have reached the disk are journalled, so an export that was killed, cancelled or ran out of disk
goes on where it stopped. The same checkpoint, recipe, calibration set and release give the same bytes,
interrupted or not.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from autoglm_edge.errors import ExportError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.manifest import MANIFEST_NAME

from .calibrate.calibration import Calibration
from .calibrate.kv_scales import Scales, find_scales, is_scale
from .calibrate.preparation import prepare
from .contents import Job, build_manifest, small_files
from .forecast import Estimate, estimate_job
from .graphs.plan import PartPlan, Weight
from .journal import Entries, Journal, read_journal
from .options import ExportOptions
from .progress import Progress, ProgressEvent
from .request import ExportRequest, called_with
from .staging import MARGIN_BYTES, Staging, check_apart, check_output, nearest_folder, write_file
from .weights.quantizer import RecipeQuantizer
from .weights.writer import write_part

__all__ = [
    "ExportOptions",
    "Progress",
    "ProgressEvent",
    "estimate",
    "export",
    "prepare",
]

HASH_BLOCK_BYTES = 1 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@called_with(ExportRequest)
def export(request: ExportRequest) -> Bundle:  # noqa: D417  callers see the fields of the request
    """Make a bundle of a checkpoint.

    While it runs, files grow in `output` + ".partial", and `output` appears in one step at the end. If an
    earlier attempt at the same export was interrupted, it is continued; one at another export is an error,
    unless `force` is given.

    Args:
        model: folder of a checkpoint, a hub id, or "pocket"; None is the embedded pocket model.
        output: folder of the bundle; it must not exist, or be empty, or hold a bundle and `force` be given.
        precision: name of a preset recipe: fp32, fp16, int8, int8-blocks, int4, int4-mixed or int4-all.
        block_size: weights that share a scale: 32, 64 or 128, in place of the recipe's own.
        symmetric: whether to store no zero points, in place of the recipe's own.
        recipe: a recipe, its TOML file or its name, in place of `precision`.
        max_image_tokens: most tokens per image, in place of the checkpoint's budget.
        revision: branch, tag or commit of a hub checkpoint.
        activations: "float32" or "float16", in place of the recipe's own.
        accuracy_level: of MatMulNBits, 0 to 4, in place of the recipe's own.
        refine: how integers are chosen, "none", "search" or "gptq", in place of the recipe's own.
        prefill: "int8" for a second form of the decoder's layers that reads prompts faster, or "none", in
            place of the recipe's own.
        calibration: JSON Lines file of prompts that gptq rounds for; see docs/export.md. None takes the set
            that comes with the package, if the recipe asks for gptq anywhere.
        kv: what the KV cache of the bundle holds: "float", numbers of the activations' type, or "int8", bytes
            with scales that are measured on the first calibration prompts; see docs/export.md.
        resume: insist on continuing an interrupted export. With `force`, that export may replace a bundle.
        force: discard an interrupted export and replace the bundle at `output`; the old one stays until the
            new one is complete.
        progress: called with what is going on, from this thread.

    Returns:
        The bundle, opened.

    Raises:
        CheckpointError: the checkpoint is missing, foreign, incomplete or damaged.
        QuantError: the recipe, or a weight that it cannot take.
        ExportError: output, disk space, or the request itself.
    """
    options, place, tell = request.options(), request.place(), request.tell
    # Said before the checkpoint is opened, which can mean a download.
    if not Staging(place).folder.exists():
        check_output(place, force=options.force)
    checkpoint = request.open_checkpoint()
    check_apart(place, checkpoint.path)
    _carry_out(prepare(checkpoint, options), place, options, tell)
    tell(ProgressEvent("done", str(request.output), 0, 0))
    return Bundle.open(Path(request.output).expanduser())


@called_with(ExportRequest)
def estimate(request: ExportRequest) -> Estimate:
    """Say what `export` with the same arguments would write, need and take, without writing anything.

    Raises:
        CheckpointError: as in `export`. QuantError: as in `export`. ExportError: as in `export`, but for an
        output that exists and too little disk space, which the estimate tells.
    """
    options, place = request.options(), request.place()
    checkpoint = request.open_checkpoint()
    check_apart(place, checkpoint.path)
    return estimate_job(prepare(checkpoint, options), place)


def _carry_out(job: Job, output: Path, options: ExportOptions, tell: Progress) -> None:
    """Write and publish, with errors of the disk turned into sentences."""
    needed = 0
    try:
        with Staging(output) as staging:
            fingerprint = job.fingerprint()
            entries = _earlier_attempt(staging, fingerprint, options)
            if entries is not None and _is_published(staging, entries):
                staging.tidy()  # killed between the rename and the end
                return
            if entries is not None:
                _check_data_files(staging, entries, job)
                done = f"{entries.count} of {job.weight_count} tensors done"
                tell(ProgressEvent("resume", f"continuing {staging.folder}, {done}", 0, 0))
            try:
                check_output(output, force=options.force, begun=entries is not None)
                needed = _check_disk(job, staging)
            except ExportError:
                if entries is None:
                    staging.tidy()
                raise
            about = f"{job.config.source} as {job.recipe.name}"
            with Journal(staging.journal, fingerprint, about, entries) as journal:
                _write_weights(job, staging, journal, entries, tell)
                digest = _write_rest(job, staging, tell)
                journal.record_manifest(digest)
            tell(ProgressEvent("publish", str(output), 0, 0))
            staging.publish()
    except OSError as error:
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(nearest_folder(output)).free
            raise ExportError(
                f"the disk of {output} is full: the export needs {needed:,} bytes in all, and {free:,} are "
                "free now; free some space and run the same export again, it goes on where it stopped"
            ) from error
        raise ExportError(
            f"the export to {output} failed at {error.filename or 'a file'} ({error.strerror or error}); "
            "run it again, it goes on where it stopped"
        ) from error


def _earlier_attempt(staging: Staging, fingerprint: str, options: ExportOptions) -> Entries | None:
    """What an interrupted export left that can be used, by the rules of `resume` and `force`.

    Raises:
        ExportError: it was another export, or `resume` was asked for and there is nothing to go on with.
    """
    if options.force and not options.resume:
        staging.discard()
        return None
    entries = read_journal(staging.journal)
    if entries is None:
        if options.resume:
            staging.tidy()
            raise ExportError(f"{staging.folder} holds no interrupted export; run without --resume")
        staging.discard()
        return None
    if entries.fingerprint != fingerprint:
        raise ExportError(
            f"{staging.folder} holds an interrupted export of another kind ({entries.about}; other weights, "
            "options or release); run that one again, or start over with --force"
        )
    return entries


def _check_data_files(staging: Staging, entries: Entries, job: Job) -> None:
    """Compare the data files with what the journal says is in them.

    Raises:
        ExportError: one is gone or has another size.
    """
    for plan in job.plans:
        path = staging.bundle / plan.data_file
        if entries.finished.get(plan.name) and not _has_size(path, plan.data_bytes):
            raise ExportError(
                f"{path} is missing or was changed since the export stopped; start over with --force"
            )


def _is_published(staging: Staging, entries: Entries) -> bool:
    """Whether the bundle at the output is the one that the journal calls complete."""
    if entries.manifest_sha256 is None:
        return False
    try:
        content = (staging.output / MANIFEST_NAME).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == entries.manifest_sha256


def _check_disk(job: Job, staging: Staging) -> int:
    """Compare what is still to be written with what is free.

    Returns:
        Bytes that the bundle needs in all.
    """
    needed = job.data_bytes + sum(len(content) for content in small_files(job).values()) + MARGIN_BYTES
    free = shutil.disk_usage(staging.folder).free
    missing = needed - staging.allocated_bytes
    if missing > free:
        raise ExportError(
            f"the export to {staging.output} needs {missing:,} more bytes, but the disk has {free:,} free; "
            "free some space, choose another disk, or a recipe with fewer bits"
        )
    return needed


def _write_weights(
    job: Job, staging: Staging, journal: Journal, entries: Entries | None, tell: Progress
) -> None:
    total = sum(plan.weight_bytes for plan in job.plans)
    done = 0
    on_disk = {plan.name: entries.finished.get(plan.name, set()) if entries else set() for plan in job.plans}
    quantizer = RecipeQuantizer(_calibration(job, on_disk, tell))
    rows = job.rows(_scales(job, on_disk, tell))
    for plan in job.plans:
        finished = on_disk[plan.name]
        done += sum(weight.size_bytes for weight in plan.weights if weight.pieces[0].name in finished)

        def advance(weight: Weight, written: int) -> None:
            nonlocal done
            done += written
            tell(ProgressEvent("weights", weight.source, done, total))

        write_part(
            plan,
            rows,
            staging.bundle / plan.data_file,
            quantizer=quantizer,
            finished=finished,
            record=lambda names, part=plan.name: journal.record(part, names),  # type: ignore[misc]
            advance=advance,
        )


def _calibration(job: Job, on_disk: Mapping[str, set[str]], tell: Progress) -> Calibration | None:
    """The run over the calibration set, for the weights that are still to be written."""
    if job.calibration is None:
        return None
    wanted = [
        weight.matrix
        for plan in job.plans
        for weight in plan.weights
        if weight.refine == "gptq" and weight.pieces[0].name not in on_disk[plan.name]
    ]
    return Calibration(
        job.store,
        job.config,
        job.calibration,
        wanted,
        lambda detail: tell(ProgressEvent("calibration", detail, 0, 0)),
    )


def _scales(job: Job, on_disk: Mapping[str, set[str]], tell: Progress) -> Scales | None:
    """Scales of an int8 cache, if any of them is still to be written."""
    if job.kv_calibration is None:
        return None
    missing = any(
        is_scale(weight.name) and weight.name not in on_disk[plan.name]
        for plan in job.plans
        for weight in plan.weights
    )
    if not missing:
        return None
    return find_scales(
        job.store,
        job.config,
        job.kv_calibration,
        lambda detail: tell(ProgressEvent("calibration", detail, 0, 0)),
    )


def _write_rest(job: Job, staging: Staging, tell: Progress) -> str:
    """Everything but the weights, the manifest last; returns the manifest's SHA-256."""
    (staging.bundle / MANIFEST_NAME).unlink(missing_ok=True)
    files = small_files(job)
    for name, content in files.items():
        tell(ProgressEvent("graphs", name, 0, 0))
        write_file(staging.bundle / name, content)
    wanted = {*files, *(plan.data_file for plan in job.plans)}
    for stray in {path.name for path in staging.bundle.iterdir()} - wanted:
        (staging.bundle / stray).unlink()
    manifest = build_manifest(job, _digests(staging.bundle, job.plans, files, tell))
    content = manifest.to_json().encode()
    write_file(staging.bundle / MANIFEST_NAME, content)
    return hashlib.sha256(content).hexdigest()


def _digests(
    folder: Path, plans: Collection[PartPlan], files: Mapping[str, bytes], tell: Progress
) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file; the data files are read back, which also proves that they can be."""
    digests = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    total = sum(plan.data_bytes for plan in plans)
    done = 0
    for plan in plans:
        digest = hashlib.sha256()
        buffer = bytearray(HASH_BLOCK_BYTES)
        size = 0
        with (folder / plan.data_file).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
                tell(ProgressEvent("hash", plan.data_file, done + size, total))
        done += size
        digests[plan.data_file] = (size, digest.hexdigest())
    return digests


def _has_size(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False
