"""The command `optimum-cli export autoglm`: the options of `autoglm-export`, handed on to it.

optimum-cli loads every file of the namespace folder `optimum.commands.register` when it starts, so this one
imports only the command classes; the exporter is loaded when the command runs. The folder has no __init__.py
and must not get one (PEP 420): optimum and its add-ons share the namespace.
"""

from __future__ import annotations

import argparse
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

# Options that go on unchanged; what they mean is checked, and told, by autoglm-export.
_VALUES = {
    "--recipe": "Preset recipe (such as int4-mixed) or recipe file (TOML) in place of a precision.",
    "--refine": "How integers are found: none, search or gptq.",
    "--calibration": "Prompts for gptq, JSON Lines.",
    "--kv": "Number type of the KV cache: float or int8.",
    "--budget-gb": "With --recipe auto: most gigabytes of the bundle.",
    "--reference": "With --recipe auto: recorded answers to measure by.",
    "--workspace": "With --recipe auto: folder of the measurements.",
    "--block-size": "Weights that share a scale: 32, 64 or 128.",
    "--activations": "float32 or float16.",
    "--accuracy-level": "4 multiplies in 8-bit integers, 0 in floats.",
    "--max-image-tokens": "Shrink images that would become more tokens.",
    "--revision": "Branch, tag or commit of a hub id.",
}
_FLAGS = {
    "--int4": "Decoder in 4 bits, the rest in 8. The default.",
    "--int8": "All large matrices in 8 bits.",
    "--fp16": "Everything as float16.",
    "--fp32": "Everything as float32.",
    "--symmetric": "Store no zero points.",
    "--asymmetric": "Store a zero point per block.",
    "--estimate": "Say what would be written and needed, and write nothing.",
    "--resume": "Go on with an interrupted export.",
    "--force": "Replace a bundle that is at the output.",
}


class AutoglmExportCommand(BaseOptimumCLICommand):
    """Export an AutoGLM-Phone checkpoint to an ONNX bundle."""

    COMMAND: ClassVar[CommandInfo] = CommandInfo(
        name="autoglm", help="Export an AutoGLM-Phone checkpoint to quantized ONNX (autoglm-edge)."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Declare the options, with the names of `autoglm-export`; the model is an option, as in optimum."""
        parser.add_argument("-m", "--model", required=True, help="Checkpoint folder, hub id, or 'pocket'.")
        parser.add_argument("output", help="Folder of the bundle.")
        for name, text in _FLAGS.items():
            parser.add_argument(name, action="store_true", help=text)
        for name, text in _VALUES.items():
            parser.add_argument(name, help=text)

    def run(self) -> None:
        """Run autoglm-export; exits with its status."""
        from autoglm_edge.cli import export_command

        export_command().main(self._arguments(), prog_name="optimum-cli export autoglm")

    def _arguments(self) -> list[str]:
        """The command line of autoglm-export that says the same."""
        given = vars(self.args)
        arguments = [name for name in _FLAGS if given[_destination(name)]]
        for name in _VALUES:
            value = given[_destination(name)]
            if value is not None:
                arguments.append(f"{name}={value}")
        return [*arguments, f"--output={given['output']}", "--", given["model"]]


def _destination(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


REGISTER_COMMANDS = [(AutoglmExportCommand, ExportCommand)]
