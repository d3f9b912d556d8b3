"""The commands `autoglm` and `autoglm-export`.

In: the command line. Out: an exit status. Each subcommand is a thin skin over a public function, in a
module of `commands/` that is imported when the command is used; the heavy imports are inside those. Knows
only their names.
"""

from __future__ import annotations

from importlib import import_module

import click

from autoglm_edge.commands.command import examples
from autoglm_edge.commands.terminal import tolerate_encodings

PROGRAM = "autoglm"
EXPORT_PROGRAM = "autoglm-export"

_COMMANDS = ("export", "run", "info", "prepare", "serve", "bench", "simulate", "record", "validate")
"""Each is a function of its name, in a module of its name in `autoglm_edge.commands`."""


class _LazyGroup(click.Group):
    """A group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(import_module(f"autoglm_edge.commands.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib import metadata  # only here: it brings email, zipfile and more

        click.echo(f"autoglm-edge {metadata.version('autoglm-edge')}")
        ctx.exit()


def version_option(command: click.Command) -> click.Command:
    """Add --version to a command."""
    option = click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Show the version and exit.",
    )
    command.params.append(option)
    return command


cli = version_option(
    _LazyGroup(
        name=PROGRAM,
        help="Export and run AutoGLM-Phone-9B on the hardware you have.\n\n"
        "A checkpoint is exported once to a bundle, a folder with ONNX graphs; everything else works on "
        "bundles. Without a model named, the small embedded model `pocket` is used.",
        epilog=examples(
            "autoglm export -o pocket-int4",
            'autoglm run pocket-int4 "Open the settings" -i screen.png',
        ),
        no_args_is_help=True,
    )
)


def main() -> None:
    """Run `autoglm`."""
    tolerate_encodings()
    cli.main(prog_name=PROGRAM)


def export_main() -> None:
    """Run `autoglm-export`, which is `autoglm export`."""
    tolerate_encodings()
    export_command().main(prog_name=EXPORT_PROGRAM)


def export_command() -> click.Command:
    """`autoglm export` as a command of its own, with --version."""
    from copy import copy

    from autoglm_edge.commands.export import export

    command = copy(export)
    command.params = list(export.params)
    command.name = EXPORT_PROGRAM
    command.epilog = (export.epilog or "").replace("autoglm export", EXPORT_PROGRAM)
    return version_option(command)
