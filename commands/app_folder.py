"""The folder for Android apps that an export lays out, and what is said of it.

In: a bundle. Out: a folder beside it. A skin over `export.app`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import needs_extra
from .progress import ProgressLine, show_event
from .quantities import format_bytes
from .terminal import print_json

if TYPE_CHECKING:
    from autoglm_edge.export.app.android import AndroidApp

APP_SUFFIX = "-android"
"""Of the folder, behind the bundle's name."""


def lay_out(bundle: Path, output: Path, *, force: bool) -> AndroidApp:
    """The app folder of a bundle.

    Args:
        bundle: its folder.
        output: folder to make.
        force: whether one that is there is replaced.

    Raises:
        DependencyError: the extra is not installed.
        EdgeError: the bundle cannot run in an app, or the folder cannot be made.
    """
    with needs_extra("export", "an app folder"):
        from autoglm_edge.export.app.android import lay_out_android
    from autoglm_edge.runtime.bundle import Bundle

    progress = ProgressLine()
    try:
        opened = Bundle.open(bundle)
        return lay_out_android(
            opened, output, force=force, progress=lambda event: show_event(progress, event)
        )
    finally:
        progress.close()


def show_app(app: AndroidApp, *, as_json: bool) -> None:
    """What was laid out, in a line, and on request as a document."""
    click.echo(
        f"{'android':10} {format_bytes(app.model_bytes):>10}  {app.path} "
        f"({app.operators} kinds of operators, all in onnxruntime-android {app.onnxruntime})"
    )
    if as_json:
        print_json({"android": app_document(app)})


def app_document(app: AndroidApp) -> dict[str, Any]:
    """The same, for programs."""
    return {
        "path": str(app.path),
        "onnxruntime_android": app.onnxruntime,
        "model_bytes": app.model_bytes,
        "linked": app.linked,
        "operators": app.operators,
    }
