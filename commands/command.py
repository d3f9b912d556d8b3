"""What every command has: how it fails, the folder it takes, the end of its help page.

In: what a command throws, and what the user wrote. Out: exit status 0 done, 1 failed, 2 wrong usage, 130
interrupted. Knows no command.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from autoglm_edge.errors import BundleError, DependencyError, EdgeError

from .terminal import harmless

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""
_EXTRAS = {
    "export": {"onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub"},
    "parity": {"safetensors", "ml_dtypes", "huggingface_hub"},
    "server": {"fastapi", "starlette", "uvicorn"},
}
"""Packages that an extra brings and that commands may meet missing, by import name."""

bundle_argument = click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document as the last line."
)


class EdgeCommand(click.Command):
    """A command whose expected errors are one sentence on stderr, and whose Ctrl-C is quiet."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            click.ClickException: an EdgeError happened, or the system refuses something (a full disk);
                click prints it and exits with status 1.
            click.exceptions.Exit: Ctrl-C, with status 130.
        """
        try:
            return super().invoke(ctx)
        except EdgeError as error:
            raise click.ClickException(harmless(" ".join(str(error).split()))) from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly when a reader goes away
                raise
            raise click.ClickException(_os_reason(error)) from error


def _os_reason(error: OSError) -> str:
    return f"{error.filename or 'a read or a write'} failed: {error.strerror or error}"


def examples(*lines: str) -> str:
    """The end of a help page: examples that click leaves as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def written_parameters(context: click.Context) -> Iterator[click.Parameter]:
    """What the user wrote on the command line, in the order of the help page."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
            yield parameter


def spelled(parameter: click.Parameter) -> str:
    """A parameter as a user writes it: TEXT, --image."""
    return parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name


@contextmanager
def needs_extra(extra: Literal["export", "parity", "server"], who: str) -> Iterator[None]:
    """Around an import: say which extra brings a package that is missing.

    Args:
        extra: name of the extra; a package that it does not bring is a fault of ours and goes through.
        who: beginning of the sentence, such as "an export".

    Raises:
        DependencyError: one of its packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _EXTRAS[extra]:
            raise
        raise DependencyError(
            f"{who} needs the package {error.name}, which is not installed; "
            f'run pip install "autoglm-edge[{extra}]"'
        ) from error


def check_is_bundle(path: Path) -> None:
    """Explain the likely mix-ups before a bundle is opened.

    Raises:
        BundleError: the path is a checkpoint, or not a folder.
    """
    if not path.exists():
        raise BundleError(f"{path} does not exist; make a bundle with `autoglm export -o {path}`")
    if not path.is_dir():
        raise BundleError(f"{path} is a file, must be the folder of a bundle")
    weights = any(path.glob("*.safetensors*"))
    if weights and (path / "config.json").exists() and not (path / "manifest.json").exists():
        raise BundleError(f"{path} is a checkpoint, not a bundle; run `autoglm export {path}` first")
