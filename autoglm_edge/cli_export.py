"""`autoglm export` and `autoglm-export`: a skin over `autoglm_edge.export` and `autoglm_edge.estimate`.

In: the command line. Out: a bundle folder, and on request a folder for Android apps; their paths and sizes on
stdout, progress on stderr. Knows nothing of how an export works.
"""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from autoglm_edge.cli_common import (
    EdgeCommand,
    ProgressLine,
    examples,
    format_bytes,
    needs_extra,
    print_json,
)

if TYPE_CHECKING:
    from autoglm_edge.export.app.android import AndroidApp
    from autoglm_edge.export.graphs.kv import KV
    from autoglm_edge.export.progress import ProgressEvent
    from autoglm_edge.quantize.recipe import Prefill, Recipe
    from autoglm_edge.quantize.rule import Refinement

POCKET = "pocket"
AUTO = "auto"
APP_SUFFIX = "-android"
"""Of the folder that --android lays out, behind the bundle's name."""
_EXPORT_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub")
_BYTES_STAGES = {"weights": "Weights", "hash": "Checking", "copy": "Copying"}
_NOTED_STAGES = ("calibration", "measure")


@click.command(
    cls=EdgeCommand,
    epilog=examples(
        "autoglm export --int4 -o pocket-int4",
        "autoglm export zai-org/AutoGLM-Phone-9B --int8 --max-image-tokens 1482 --android -o phone-int8",
    ),
)
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="Folder of the bundle. [default: ./MODEL-PRECISION]",
)
@click.option("--int4", is_flag=True, help="Store the decoder in 4 bits and the rest in 8. The default.")
@click.option("--int8", is_flag=True, help="Store all large matrices in 8 bits.")
@click.option("--fp16", is_flag=True, help="Store everything as float16.")
@click.option("--fp32", is_flag=True, help="Store everything as float32.")
@click.option(
    "--recipe",
    metavar="NAME_OR_FILE",
    help="Take a named recipe, such as int4-mixed, or a TOML file instead; or make one by measurement: auto.",
)
@click.option("--block-size", type=click.Choice(["32", "64", "128"]), help="Weights that share a scale.")
@click.option("--symmetric/--asymmetric", default=None, help="Store no zero points, or one per block.")
@click.option(
    "--refine",
    type=click.Choice(["none", "search", "gptq"]),
    help="Choose integers one by one, with better scales, or for least error on prompts.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompts for gptq, JSON Lines. [default: a set of its own]",
)
@click.option(
    "--prefill",
    type=click.Choice(["none", "int8"]),
    help="Add the decoder's layers in 8 bits once more, to read prompts faster.",
)
@click.option(
    "--kv",
    type=click.Choice(["float", "int8"]),
    default="float",
    show_default=True,
    help="Number type of the KV cache; int8 takes a quarter of float32.",
)
@click.option("--activations", type=click.Choice(["float32", "float16"]), help="Number type between layers.")
@click.option(
    "--accuracy-level", type=click.Choice(["0", "4"]), help="4 multiplies in 8-bit integers, 0 in floats."
)
@click.option(
    "--max-image-tokens", type=click.IntRange(min=1), metavar="N", help="Shrink larger images to N tokens."
)
@click.option(
    "--budget-gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="For --recipe auto: most size of the bundle, in 10^9 bytes.",
)
@click.option(
    "--reference",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For --recipe auto: what `autoglm record` wrote, to measure with.",
)
@click.option(
    "--workspace",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="For --recipe auto: keeps measurements. [default: OUTPUT.auto]",
)
@click.option(
    "--android",
    is_flag=True,
    help="Lay out a folder for Android apps, too: OUTPUT-android. MODEL may be a bundle.",
)
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--estimate", is_flag=True, help="Say what would be written and needed, and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted export; fail if there is none.")
@click.option("--force", is_flag=True, help="Start over, and replace a bundle that is at the output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document as the last line.")
def export(
    model: str | None,
    output: str | None,
    int4: bool,
    int8: bool,
    fp16: bool,
    fp32: bool,
    recipe: str | None,
    block_size: str | None,
    symmetric: bool | None,
    refine: Refinement | None,
    calibration: Path | None,
    prefill: Prefill | None,
    kv: KV,
    activations: Literal["float32", "float16"] | None,
    accuracy_level: str | None,
    max_image_tokens: int | None,
    budget_gb: float | None,
    reference: Path | None,
    workspace: Path | None,
    android: bool,
    revision: str | None,
    estimate: bool,
    resume: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a bundle that runs without torch.

    MODEL is a checkpoint folder or a Hugging Face name; without it, the small embedded model `pocket` is
    taken. The bundle appears in one step when it is complete, and an export that was interrupted goes on
    where it stopped when the same command is run again.

    With `--android` the bundle is checked against the operators of a release of onnxruntime-android, and a
    folder is laid out that an app can take. If MODEL is a bundle already, that is all that is done.

    With `--recipe auto` the bits of each group of tensors are chosen by measuring what it costs to have
    fewer, for the least loss within a size.
    """
    chosen = [name for name, on in (("int4", int4), ("int8", int8), ("fp16", fp16), ("fp32", fp32)) if on]
    if len(chosen) > 1:
        raise click.UsageError(f"choose one of {', '.join('--' + name for name in chosen)}")
    if chosen and recipe is not None:
        raise click.UsageError(f"choose --{chosen[0]} or --recipe, not both")
    if android and estimate:
        raise click.UsageError("--android lays out what an export wrote, so it cannot be estimated")
    from autoglm_edge.runtime.manifest import MANIFEST_NAME

    if model is not None and (Path(model) / MANIFEST_NAME).is_file():
        if not android:
            raise click.UsageError(f"{model} is a bundle already; --android lays it out for an app")
        _refuse_changes()
        _show_app(_lay_out(Path(model), Path(output or f"{model.rstrip('/')}{APP_SUFFIX}"), force), as_json)
        return
    _check_auto(recipe, {"--budget-gb": budget_gb, "--reference": reference}, workspace, estimate)
    if recipe == AUTO and calibration is not None and refine != "gptq":
        raise click.UsageError(f"--calibration means something to --recipe {AUTO} with --refine gptq only")
    for option, value in (("--prefill", prefill), ("--kv", kv)):
        if recipe == AUTO and value == "int8":
            raise click.UsageError(
                f"--recipe {AUTO} keeps a budget that {option} int8 is no part of; export the recipe that it "
                f"writes with {option} int8"
            )
    precision = chosen[0] if chosen else "int4"
    if model is None:
        click.echo(f"No MODEL given: taking {POCKET}, the small model that comes with this package", err=True)
    if output is not None and not output.strip():
        raise click.UsageError("the output is empty; name a folder that does not exist yet")
    place = Path(output or default_output(model, recipe or precision))
    changes: dict[str, Any] = {
        "block_size": int(block_size) if block_size else None,
        "symmetric": symmetric,
        "activations": activations,
        "accuracy_level": int(accuracy_level) if accuracy_level else None,
        "refine": refine,
        "prefill": prefill,
    }
    options: dict[str, Any] = {
        "precision": precision,
        "recipe": recipe,
        "calibration": calibration,
        "kv": kv,
        "max_image_tokens": max_image_tokens,
        "revision": revision,
        "resume": resume,
        "force": force,
    }
    with needs_extra("export", _EXPORT_PACKAGES, "an export"):
        from autoglm_edge.export import pipeline
    progress = ProgressLine()
    if android:
        from autoglm_edge.export.app.android import check_app_output

        check_app_output(Path(f"{place}{APP_SUFFIX}"), place, force=force)
    if estimate:
        report = pipeline.estimate(model, place, **options, **changes)
        click.echo(report.to_table())
        if as_json:
            click.echo(report.to_json())
        return
    started = time.monotonic()
    try:
        if budget_gb is not None and reference is not None:
            options["recipe"] = _auto_recipe(
                model, reference, budget_gb, workspace or Path(f"{place}.auto"), options, changes, progress
            )
            changes = {}
        bundle = pipeline.export(
            model, place, progress=lambda event: _show(progress, event), **options, **changes
        )
    except KeyboardInterrupt:
        progress.say("Stopped; run the same command again to go on from here")
        raise
    finally:
        progress.close()
    seconds = time.monotonic() - started
    manifest = bundle.manifest
    for name, part in manifest.parts.items():
        if part.weight_bytes:  # the layer has no bytes of its own
            click.echo(f"{name:10} {format_bytes(part.weight_bytes):>10}")
    click.echo(f"{'bundle':10} {format_bytes(manifest.total_bytes):>10}  {place}")
    progress.say(
        f"Done in {seconds:.0f} s; ask it with: autoglm run {shlex.quote(str(place))} --image SCREENSHOT TASK"
    )
    app = _lay_out(place, Path(f"{place}{APP_SUFFIX}"), force) if android else None
    if app is not None:
        _show_app(app, as_json=False)
    if as_json:
        print_json(
            {
                "bundle": str(place),
                "model": manifest.source.model,
                "recipe": manifest.recipe.get("name"),
                "total_bytes": manifest.total_bytes,
                "weight_bytes": {name: part.weight_bytes for name, part in manifest.parts.items()},
                "seconds": round(seconds, 3),
            }
            | ({} if app is None else {"android": _app_document(app)})
        )


def _refuse_changes() -> None:
    """A bundle is laid out as it is: options that would change it are refused, not ignored."""
    context = click.get_current_context()
    kept = {"model", "output", "android", "force", "as_json"}
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in kept and source is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"MODEL is a bundle, which {option.opts[0]} cannot change; leave it out")


def _lay_out(bundle: Path, output: Path, force: bool) -> AndroidApp:
    """The app folder of a bundle."""
    with needs_extra("export", _EXPORT_PACKAGES, "an app folder"):
        from autoglm_edge.export.app.android import lay_out_android
    from autoglm_edge.runtime.bundle import Bundle

    progress = ProgressLine()
    try:
        opened = Bundle.open(bundle)
        return lay_out_android(opened, output, force=force, progress=lambda event: _show(progress, event))
    finally:
        progress.close()


def _show_app(app: AndroidApp, as_json: bool) -> None:
    """What was laid out."""
    click.echo(
        f"{'android':10} {format_bytes(app.model_bytes):>10}  {app.path} "
        f"({app.operators} kinds of operators, all in onnxruntime-android {app.onnxruntime})"
    )
    if as_json:
        print_json({"android": _app_document(app)})


def _app_document(app: AndroidApp) -> dict[str, Any]:
    return {
        "path": str(app.path),
        "onnxruntime_android": app.onnxruntime,
        "model_bytes": app.model_bytes,
        "linked": app.linked,
        "operators": app.operators,
    }


def default_output(model: str | None, recipe: str) -> str:
    """Folder name for a model and a precision or recipe: AutoGLM-Phone-9B-int4."""
    folder = model is not None and Path(model).exists()
    name = Path(model or "").resolve().name if folder else (model or POCKET).rstrip("/").split("/")[-1]
    kind = Path(recipe).stem if recipe.endswith(".toml") else recipe
    return "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-") or "model" for part in (name, kind))


def _check_auto(
    recipe: str | None, needed: Mapping[str, object], workspace: Path | None, estimate: bool
) -> None:
    """Refuse what `--recipe auto` lacks, and what means nothing without it."""
    if recipe != AUTO:
        given = [name for name, value in {**needed, "--workspace": workspace}.items() if value is not None]
        if given:
            raise click.UsageError(f"{given[0]} means something with --recipe {AUTO} only")
        return
    budget = needed["--budget-gb"]
    if isinstance(budget, float) and not math.isfinite(budget):
        raise click.UsageError(f"--budget-gb is {budget}, must be a finite number")
    if missing := [name for name, value in needed.items() if value is None]:
        raise click.UsageError(f"--recipe {AUTO} needs {missing[0]}")
    if estimate:
        raise click.UsageError(f"--recipe {AUTO} is made by measuring, so it cannot be estimated")


def _auto_recipe(
    model: str | None,
    reference: Path,
    budget_gb: float,
    workspace: Path,
    options: Mapping[str, Any],
    changes: Mapping[str, Any],
    progress: ProgressLine,
) -> Recipe:
    """Measure and choose. Changes of formats are made to the lowest level, other changes to all."""
    from autoglm_edge.autorecipe.search import DEFAULT_LEVELS, AutoOptions, auto_recipe
    from autoglm_edge.quantize.recipe import Recipe
    from autoglm_edge.quantize.recipe_reading import resolve

    everywhere = {key: changes[key] for key in ("activations", "accuracy_level")}
    defaults: Sequence[Recipe | str] = DEFAULT_LEVELS
    named = [level if isinstance(level, Recipe) else resolve(level) for level in defaults]
    levels = (*(level.with_(**everywhere) for level in named[:-1]), named[-1].with_(**changes))
    chosen = AutoOptions(
        max_image_tokens=options["max_image_tokens"],
        revision=options["revision"],
        levels=levels,
        calibration=options["calibration"],
    )
    recipe = auto_recipe(
        model,
        reference,
        round(budget_gb * 1e9),
        workspace=workspace,
        progress=lambda event: _show(progress, event),
        options=chosen,
    )
    progress.say(f"Chose {recipe.name}; levels and measurements are in {workspace}, for another budget")
    return recipe


def _show(progress: ProgressLine, event: ProgressEvent) -> None:
    if event.stage in _BYTES_STAGES:
        progress.show(_BYTES_STAGES[event.stage], event.done_bytes, event.total_bytes)
    elif event.stage in _NOTED_STAGES:
        progress.note(event.detail)
    elif event.stage == "resume":
        progress.say(event.detail)
