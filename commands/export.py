"""`autoglm export` and `autoglm-export`: a skin over `autoglm_edge.export` and `autoglm_edge.estimate`.

In: the command line. Out: a bundle folder, and on request a folder for Android apps; their paths and sizes on
stdout, progress on stderr. Knows nothing of how an export works.
"""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import click

from autoglm_edge.embedded import POCKET_NAME

from .app_folder import APP_SUFFIX, app_document, lay_out, show_app
from .auto_recipe import measured_recipe
from .command import EdgeCommand, examples, json_option, needs_extra, written_parameters
from .options.auto import AUTO, AutoChoice, auto_options
from .options.formats import FormatChoice, format_options
from .progress import ProgressLine, show_event
from .quantities import format_bytes
from .terminal import print_json


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
@format_options
@auto_options
@click.option(
    "--android",
    is_flag=True,
    help="Lay out a folder for Android apps, too: OUTPUT-android. MODEL may be a bundle.",
)
@click.option("--revision", help="Branch, tag or commit of a hub checkpoint.")
@click.option("--estimate", is_flag=True, help="Say what would be written and needed, and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted export; fail if there is none.")
@click.option("--force", is_flag=True, help="Start over, and replace a bundle that is at the output.")
@json_option
def export(
    model: str | None,
    output: str | None,
    formats: FormatChoice,
    auto: AutoChoice,
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
    formats.check()
    if android and estimate:
        raise click.UsageError("--android lays out what an export wrote, so it cannot be estimated")
    from autoglm_edge.runtime.manifest import MANIFEST_NAME

    if model is not None and (Path(model) / MANIFEST_NAME).is_file():
        if not android:
            raise click.UsageError(f"{model} is a bundle already; --android lays it out for an app")
        _refuse_changes()
        folder = Path(output or f"{model.rstrip('/')}{APP_SUFFIX}")
        show_app(lay_out(Path(model), folder, force=force), as_json=as_json)
        return
    auto.check(formats, estimate=estimate)
    if model is None:
        click.echo(
            f"No MODEL given: taking {POCKET_NAME}, the small model that comes with this package", err=True
        )
    if output is not None and not output.strip():
        raise click.UsageError("the output is empty; name a folder that does not exist yet")
    place = Path(output or default_output(model, formats.recipe or formats.precision))
    changes = formats.changes()
    options: dict[str, Any] = {
        "precision": formats.precision,
        "recipe": formats.recipe,
        "calibration": formats.calibration,
        "kv": formats.kv,
        "max_image_tokens": formats.max_image_tokens,
        "revision": revision,
        "resume": resume,
        "force": force,
    }
    with needs_extra("export", "an export"):
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
        if formats.recipe == AUTO:
            options["recipe"] = measured_recipe(auto, formats, model, revision, place, progress)
            changes = {}
        bundle = pipeline.export(
            model, place, progress=lambda event: show_event(progress, event), **options, **changes
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
    app = lay_out(place, Path(f"{place}{APP_SUFFIX}"), force=force) if android else None
    if app is not None:
        show_app(app, as_json=False)
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
            | ({} if app is None else {"android": app_document(app)})
        )


def _refuse_changes() -> None:
    """A bundle is laid out as it is: options that would change it are refused, not ignored."""
    kept = {"model", "output", "android", "force", "as_json"}
    for option in written_parameters(click.get_current_context()):
        if option.name not in kept:
            raise click.UsageError(f"MODEL is a bundle, which {option.opts[0]} cannot change; leave it out")


def default_output(model: str | None, recipe: str) -> str:
    """Folder name for a model and a precision or recipe: AutoGLM-Phone-9B-int4."""
    folder = model is not None and Path(model).exists()
    name = Path(model or "").resolve().name if folder else (model or POCKET_NAME).rstrip("/").split("/")[-1]
    kind = Path(recipe).stem if recipe.endswith(".toml") else recipe
    return "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-") or "model" for part in (name, kind))
