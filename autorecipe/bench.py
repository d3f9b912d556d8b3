"""A workspace in which any mixture of levels can be run without being exported.

In: the levels of a checkpoint. Out: a folder with the bundle of each level, and beside them one mixture at a
time as a bundle of its own: three small graphs whose initializers point into the data files of the levels.
Measures them, and asks the journal first. Knows nothing of budgets and recipes' names.

    WORKSPACE/measurements.json           see measurements.py
    WORKSPACE/level-0/, level-1/, ...     bundles, everything at one level
    WORKSPACE/manifest.json, *.onnx, ...  the mixture that is being measured
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from autoglm_edge.errors import ParityError
from autoglm_edge.export.card import CARD_NAME
from autoglm_edge.export.contents import Job, graph_bytes
from autoglm_edge.export.graphs.genai import GENAI_NAME
from autoglm_edge.export.graphs.plan import IR_DTYPES, PartPlan, Weight, by_matrix
from autoglm_edge.export.progress import Progress, ProgressEvent
from autoglm_edge.export.staging import write_file
from autoglm_edge.parity.reference import Reference
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.manifest import MANIFEST_NAME, FileEntry, Part
from autoglm_edge.runtime.session import SessionOptions

from .levels import Levels, Palette
from .measurements import Journal, Measurement, mixture_key
from .sensitivity import measure


class Bench:
    """A workspace: the levels, exported once each, and one mixture of them at a time as a bundle.

    Attributes:
        palette: the levels.
        reference: to measure against.
    """

    def __init__(
        self,
        folder: Path,
        palette: Palette,
        reference: Reference,
        journal: Journal,
        prompts: int | None,
        options: SessionOptions,
        tell: Progress,
    ) -> None:
        """Take what is needed; nothing is written yet."""
        self.palette = palette
        self.reference = reference
        self._folder = folder
        self._journal = journal
        self._prompts = prompts
        self._options = options
        self._tell = tell
        self._names = [f"level-{number}" for number in range(len(palette.levels))]
        self._bundles: list[Bundle] = []

    def export_levels(self, export_level: Callable[[Recipe, Path], Bundle]) -> None:
        """Export what is not there yet, and copy the small files that an engine reads.

        Raises:
            ExportError: an export fails.
            ParityError: a level that is there is not what it should be.
        """
        for name, job in zip(self._names, self.palette.jobs, strict=True):
            path = self._folder / name
            if (path / MANIFEST_NAME).exists():
                bundle = Bundle.open(path)
            else:
                self._tell(ProgressEvent("measure", f"storing everything as {job.recipe.name}", 0, 0))
                bundle = export_level(job.recipe, path)
            if bundle.manifest.recipe != job.recipe.to_json() or not _is_laid_out(bundle, job):
                raise ParityError(
                    f"{path} is not an export of {job.recipe.name}; delete it, or name another workspace"
                )
            self._bundles.append(bundle)
        for entry in self._small_files():
            self._write(entry.path, self._bundles[0].file(entry.path).read_bytes())

    def measure(self, levels: Levels, label: str, *, check: bool = False) -> Measurement:
        """Divergence of a mixture, from the journal if it is known.

        Args:
            levels: of tensors that are not at the highest level.
            label: for people.
            check: whether prompts are prepared as they were recorded.
        """
        names = {name: self.palette.levels[levels.get(name, 0)].name for name in self.palette.tensors}
        key = mixture_key(names)
        found = self._journal.get(key)
        if found is None:
            self._tell(ProgressEvent("measure", label, 0, 0))
            bundle = self.bundle(levels)
            found = measure(bundle, self.reference, prompts=self._prompts, options=self._options, check=check)
            self._journal.add(key, label.partition(": ")[2], found)
        return found

    def bundle(self, levels: Levels) -> Bundle:
        """Write graphs that read every tensor from its level, and a manifest; the one before is replaced."""
        job = self.palette.job(self.palette.mixture(levels))
        parts: dict[str, Part] = {}
        entries = [*self._small_files()]
        for plan in job.plans:
            content = self._graph(plan, levels)
            self._write(plan.graph_file, content)
            entries.append(FileEntry(plan.graph_file, len(content), hashlib.sha256(content).hexdigest()))
            parts[plan.name] = Part(plan.graph_file, f"{self._names[0]}/{plan.data_file}", plan.weight_bytes)
        for name, level in zip(self._names, self._bundles, strict=True):
            data = {part.data for part in level.manifest.parts.values()}
            entries += [
                replace(entry, path=f"{name}/{entry.path}")
                for entry in level.manifest.files
                if entry.path in data
            ]
        manifest = replace(
            self._bundles[0].manifest,
            recipe=job.recipe.to_json(),
            parts=parts,
            files=tuple(entries),
            figures={},
        )
        self._write(MANIFEST_NAME, manifest.to_json().encode())
        return Bundle.open(self._folder)

    def _graph(self, plan: PartPlan, levels: Levels) -> bytes:
        graph_bytes(plan)  # checks that graph and plan name the same initializers
        values = plan.model.graph.initializers
        for name, weights in by_matrix(plan.weights).items():
            level = levels.get(name, 0)
            placed = self.palette.placed(name, level)
            if placed.part != plan.name or _forms(placed.weights) != _forms(weights):
                raise ParityError(f"{name} is stored otherwise in {self._names[level]}; delete the workspace")
            for piece in (piece for weight in placed.weights for piece in weight.pieces):
                values[piece.name].const_value = ir.ExternalTensor(
                    f"{self._names[level]}/{plan.data_file}",
                    piece.offset,
                    piece.size_bytes,
                    IR_DTYPES[piece.dtype],
                    shape=ir.Shape(piece.shape),
                    name=piece.name,
                )
        content: bytes = ir.to_proto(plan.model).SerializeToString(deterministic=True)
        return content

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_file(self._folder / name, content)
        except OSError as error:
            raise ParityError(
                f"{self._folder / name} cannot be written ({error.strerror or error}); make room and run the "
                "same command again, it goes on where it stopped"
            ) from error

    def _small_files(self) -> list[FileEntry]:
        """What an engine reads beside the graphs."""
        manifest = self._bundles[0].manifest
        own = {CARD_NAME, GENAI_NAME, *(part.data for part in manifest.parts.values())}
        return [
            entry for entry in manifest.files if entry.path not in own and not entry.path.endswith(".onnx")
        ]


def _is_laid_out(bundle: Bundle, job: Job) -> bool:
    """Whether data files have the planned lengths, and graphs look for weights at the planned places.

    A release that lays them out otherwise can give files of the same length.
    """
    found = {entry.path: entry for entry in bundle.manifest.files}
    return all(
        plan.data_file in found
        and found[plan.data_file].size_bytes == plan.data_bytes
        and plan.graph_file in found
        and found[plan.graph_file].sha256 == hashlib.sha256(graph_bytes(plan)).hexdigest()
        for plan in job.plans
    )


def _forms(weights: Iterable[Weight]) -> list[Weight]:
    """Weights without their places in a file and without how integers are chosen, which no graph tells."""
    return [
        replace(weight, pieces=tuple(replace(piece, offset=-1) for piece in weight.pieces), refine="none")
        for weight in weights
    ]
