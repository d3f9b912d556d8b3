"""Decides everything about an export: from a checkpoint and options to a `Job`.

In: an opened checkpoint, `ExportOptions`. Out: a `Job`, checked against the checkpoint. Nothing is written,
and no weight is read; of a calibration set the prompts are made.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from autoglm_edge.errors import ExportError, RequestError
from autoglm_edge.export.contents import Job
from autoglm_edge.export.graphs.embedding import plan_embedding
from autoglm_edge.export.graphs.layer import plan_open_layer
from autoglm_edge.export.graphs.links import channel_links
from autoglm_edge.export.graphs.plan import PartPlan
from autoglm_edge.export.graphs.text import plan_decoder, plan_prefill
from autoglm_edge.export.graphs.vision import STEM as VISION
from autoglm_edge.export.graphs.vision import plan_vision
from autoglm_edge.export.options import ExportOptions
from autoglm_edge.export.source.checkpoint import Checkpoint, ModelConfig
from autoglm_edge.export.source.shapes import HEAD, expected_tensors
from autoglm_edge.export.weights.balance import Balanced
from autoglm_edge.export.weights.rows import Rows, source_matrix
from autoglm_edge.runtime.manifest import ImageSpec

from .calibration_set import CalibrationSet, built_in_set, read_calibration
from .kv_scales import KV_TOKENS


def prepare(checkpoint: Checkpoint, options: ExportOptions) -> Job:
    """Decide everything about an export, and check the checkpoint against it.

    Raises:
        CheckpointError: a tensor is missing or has another shape than config.json says.
        ExportError: the image budget does not fit the model, or the calibration set cannot be used.
        QuantError: a rule of the recipe that matches nothing, or layers that are not there.
    """
    config = checkpoint.config
    expected = expected_tensors(config)
    checkpoint.check(expected)
    config = replace(config, image=image_budget(config, options.max_image_tokens))
    recipe = options.recipe.for_layers(decoder=config.text.layers, vision=config.vision.depth)
    recipe.check_names((*expected, HEAD))  # a tied head is stored by the rules for heads
    decoder = plan_decoder(config, recipe, options.kv)
    plans = [decoder, plan_embedding(config, recipe), plan_vision(config, recipe)]
    if recipe.prefill != "none":
        plans.append(plan_prefill(config, recipe, decoder, options.kv))
    store: Rows = checkpoint.tensors
    if recipe.balance:
        store = Balanced(store, channel_links(config), recipe.activations)
    measured = None
    if options.kv == "int8":
        path = options.calibration or built_in_set()
        measured = read_calibration(path, checkpoint, config, max_tokens=KV_TOKENS)
    job = Job(
        checkpoint,
        config,
        recipe,
        tuple(plans),
        store,
        options.max_image_tokens,
        _calibration_set(checkpoint, config, plans, options),
        plan_open_layer(config, recipe, decoder, options.kv),
        measured,
    )
    rows = job.rows()
    for plan in plans:
        for weight in plan.weights:
            source_matrix(weight, rows.shape(weight.source))
    return job


def _calibration_set(
    checkpoint: Checkpoint, config: ModelConfig, plans: Collection[PartPlan], options: ExportOptions
) -> CalibrationSet | None:
    """The set that is needed; None if no weight is refined by gptq.

    Raises:
        ExportError: it cannot be used.
    """
    wanted = [weight for plan in plans for weight in plan.weights if weight.refine == "gptq"]
    if not wanted:
        return None
    path = options.calibration or built_in_set()
    samples = read_calibration(path, checkpoint, config)
    vision = next((weight for weight in wanted if weight.name.startswith(VISION)), None)
    if vision is not None and not samples.images:
        raise ExportError(
            f"recipe {options.recipe.name} refines {vision.name} by gptq, but the calibration set {path} "
            f"shows the vision tower no picture in {samples.tokens:,} tokens; add some, or refine by search"
        )
    return samples


def image_budget(config: ModelConfig, max_tokens: int | None) -> ImageSpec:
    """The image processor with another limit of tokens per image.

    Raises:
        ExportError: fewer tokens than the smallest image takes, or more than the context holds.
    """
    if max_tokens is None:
        return config.image
    most = config.text.context_length - 3  # the two tokens around an image, and one of text
    if max_tokens > most:
        raise ExportError(
            f"max_image_tokens is {max_tokens}, must be at most {most}, which is what the context of "
            f"{config.text.context_length} tokens holds"
        )
    try:
        return config.image.with_max_tokens(max_tokens)
    except RequestError as error:
        raise ExportError(str(error)) from error
