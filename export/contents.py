"""The small files of a bundle, and its manifest: everything but the weights.

In: a `Job`, which is a checkpoint with all decisions made. Out: file names and bytes. Nothing here is read
from or written to the output folder, so that an estimate can add up the very bytes that an export will write.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from autoglm_edge.errors import ExportError
from autoglm_edge.quantize.recipe import Recipe
from autoglm_edge.runtime.layerwise.index import index_to_json
from autoglm_edge.runtime.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Geometry,
    Manifest,
    Part,
    Source,
)

from .calibrate.calibration_set import CalibrationSet
from .calibrate.kv_scales import MARGIN, ScaledRows, Scales
from .card import CARD_NAME, model_card
from .files import CONFIG_NAME, PREPROCESSOR_NAME, json_object
from .graphs.genai import GENAI_DECODER_NAME, GENAI_NAME, genai_config, genai_decoder, to_bytes
from .graphs.kv import KV
from .graphs.layer import LAYER_GRAPH, LAYER_INDEX, LayerPlan
from .graphs.plan import IR_DTYPES, ITEM_BYTES, Dtype, PartPlan, data_file
from .source.checkpoint import Checkpoint, ModelConfig
from .source.processor import with_pixel_budget
from .source.shapes import expected_tensors
from .weights.rows import Rows

TOOLS = ("numpy", "onnx", "onnx-ir", "onnxscript")
"""Packages whose version can change what is written."""

_LICENCE = re.compile(rb"\A---\n.*?^license:[ \t]*([\w.+-]+)[ \t]*$.*?^---", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Job:
    """An export with every decision made.

    Attributes:
        checkpoint: the source.
        config: of the checkpoint, with the image budget of the bundle.
        recipe: with the layer numbers of this checkpoint.
        plans: decoder, embedding and vision, in this order, and prefill if the recipe asks for it.
        store: where values are read: the checkpoint's tensors, with balanced channels if the recipe says so.
        max_image_tokens: the budget that was asked for; None keeps the checkpoint's own.
        calibration: what weights are rounded for; None if none of them needs it.
        layer: one layer's graph and where the weights of all lie, where that is of use.
        kv_calibration: what the scales of an int8 cache are measured on; None for a cache of floats.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    recipe: Recipe
    plans: tuple[PartPlan, ...]
    store: Rows
    max_image_tokens: int | None
    calibration: CalibrationSet | None = None
    layer: LayerPlan | None = None
    kv_calibration: CalibrationSet | None = None

    @property
    def kv(self) -> KV:
        """What the cache holds."""
        return "float" if self.kv_calibration is None else "int8"

    @property
    def kv_dtype(self) -> Dtype:
        """Of the cache."""
        return self.recipe.activations if self.kv == "float" else "int8"

    def rows(self, scales: Scales | None = None) -> Rows:
        """All that the writer reads: the store, and scales of the cache among its tensors.

        Args:
            scales: measured; None where only shapes are asked for.
        """
        if self.kv == "float":
            return self.store
        text = self.config.text
        return ScaledRows(self.store, text.kv_heads * text.head_dim, scales or {})

    @property
    def weight_count(self) -> int:
        """Weights over all parts, in the sense of `plan.Weight`."""
        return sum(len(plan.weights) for plan in self.plans)

    @property
    def data_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(plan.data_bytes for plan in self.plans)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache: keys and values of every layer."""
        text = self.config.text
        return 2 * text.layers * text.kv_heads * text.head_dim * ITEM_BYTES[self.kv_dtype]

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which bytes land where in the data files; equal for equal exports."""
        document = {
            "created_by": created_by(),
            "numpy": version("numpy"),
            "onnxruntime": version("onnxruntime") if self.calibration or self.kv_calibration else None,
            "weights": self.checkpoint.tensors.fingerprint(),
            "config": self.config.config_sha256,
            "max_image_tokens": self.max_image_tokens,
            "recipe": self.recipe.to_json(),
            "calibration": self.calibration.sha256 if self.calibration else None,
            "kv_calibration": [self.kv_calibration.sha256, MARGIN] if self.kv_calibration else None,
            "layout": [
                [plan.name, plan.data_bytes, [repr(weight) for weight in plan.weights]] for plan in self.plans
            ],
        }
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def created_by() -> str:
    """This program and its version, as manifests name it."""
    return f"autoglm-edge {version('autoglm-edge')}"


def graph_bytes(plan: PartPlan) -> bytes:
    """Serialize a graph whose weights lie in its data file, and where it borrows some, in that of another.

    Raises:
        ExportError: the graph and its weight plan do not name the same initializers.
    """
    places = [(plan.data_file, plan.weights)]
    if plan.lender is not None:
        places.append((data_file(plan.lender), plan.borrowed))
    pieces = {
        piece.name: (file, piece) for file, weights in places for weight in weights for piece in weight.pieces
    }
    values = plan.model.graph.initializers
    for name, (file, piece) in pieces.items():
        if name not in values:
            raise ExportError(f"{plan.graph_file} has no initializer {name}, which its weight plan stores")
        values[name].const_value = ir.ExternalTensor(
            file,
            piece.offset,
            piece.size_bytes,
            IR_DTYPES[piece.dtype],
            shape=ir.Shape(piece.shape),
            name=name,
        )
    if empty := [name for name, value in values.items() if value.const_value is None]:
        raise ExportError(
            f"{plan.graph_file} needs the initializer {empty[0]}, which its weight plan does not store"
        )
    return _serialized(plan.model)


def _serialized(model: ir.Model) -> bytes:
    model.producer_name = "autoglm-edge"
    model.producer_version = version("autoglm-edge")
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def small_files(job: Job) -> dict[str, bytes]:
    """Every file of the bundle but the data files and the manifest, by name.

    Raises:
        CheckpointError: a file of the checkpoint that must be edited is damaged.
        ExportError: a graph and its weight plan disagree.
    """
    files = {plan.graph_file: graph_bytes(plan) for plan in job.plans}
    plans = {plan.name: plan for plan in job.plans}
    files[GENAI_DECODER_NAME] = genai_decoder(files[plans["decoder"].graph_file])
    if job.layer is not None:
        files[LAYER_GRAPH] = _serialized(job.layer.model)
        files[LAYER_INDEX] = index_to_json(job.layer.index).encode()
    side = job.checkpoint.side_files()
    if clash := sorted(set(side) & {*files, CARD_NAME, GENAI_NAME, *(plan.data_file for plan in job.plans)}):
        raise ExportError(f"the checkpoint wants to add {clash[0]}, a name that the bundle itself uses")
    if job.max_image_tokens is not None and PREPROCESSOR_NAME in side:
        side[PREPROCESSOR_NAME] = with_pixel_budget(side[PREPROCESSOR_NAME], job.config.image)
    files.update(side)
    files[GENAI_NAME] = to_bytes(genai_config(job.config, plans, json_object(side[CONFIG_NAME], CONFIG_NAME)))
    sizes = {name: len(content) for name, content in files.items()}
    sizes.update({plan.data_file: plan.data_bytes for plan in job.plans})
    card = model_card(
        config=job.config,
        model=job.config.source,
        recipe=job.recipe,
        image=job.config.image,
        created_by=created_by(),
        kv_bytes_per_token=job.kv_bytes_per_token,
        parts=parts(job),
        sizes=sizes,
        calibration=job.calibration.description if job.calibration else None,
        kv_calibration=job.kv_calibration.description if job.kv_calibration else None,
        licence=licence_of(job.checkpoint.path),
    )
    files[CARD_NAME] = card.encode()
    return files


def parts(job: Job) -> dict[str, Part]:
    """The parts as the manifest lists them."""
    found = {
        plan.name: Part(plan.graph_file, plan.data_file, plan.weight_bytes, plan.is_integer)
        for plan in job.plans
    }
    if job.layer is not None:
        found["layer"] = Part(LAYER_GRAPH, LAYER_INDEX, 0, integer=True)
    return found


def build_manifest(job: Job, files: Mapping[str, tuple[int, str]]) -> Manifest:
    """The manifest of a bundle.

    Args:
        job: what was exported.
        files: size and SHA-256 of every file, by name.
    """
    config, text = job.config, job.config.text
    expected = expected_tensors(config)
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=created_by(),
        tools={name: version(name) for name in TOOLS},
        source=Source(
            model=job.config.source,
            revision=job.checkpoint.revision,
            config_sha256=config.config_sha256,
            parameters=sum(math.prod(shape) for shape in expected.values()),
        ),
        geometry=Geometry(
            layers=text.layers,
            hidden=text.hidden,
            heads=text.heads,
            kv_heads=text.kv_heads,
            head_dim=text.head_dim,
            vocab=text.vocab,
            context_length=text.context_length,
        ),
        image=config.image,
        tokens=config.tokens,
        recipe=job.recipe.to_json(),
        activations=job.recipe.activations,
        kv_dtype=job.kv_dtype,
        kv_bytes_per_token=job.kv_bytes_per_token,
        parts=parts(job),
        generation=dict(config.generation),
        files=tuple(FileEntry(name, size, digest) for name, (size, digest) in sorted(files.items())),
        calibration=job.calibration.description if job.calibration else None,
        kv_calibration=job.kv_calibration.description if job.kv_calibration else None,
    )


def licence_of(checkpoint: Path) -> str | None:
    """The licence that the checkpoint's own model card names, or None."""
    try:
        found = _LICENCE.match((checkpoint / CARD_NAME).read_bytes().replace(b"\r\n", b"\n"))
    except OSError:
        return None
    return found[1].decode() if found else None
