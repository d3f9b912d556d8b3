"""The plug-in of optimum-cli, run for real in processes of its own.

Needs optimum, which the extra [optimum] installs; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "from optimum.commands.optimum_cli import main; main()"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("optimum.commands.optimum_cli") is None,
        reason="optimum is not installed; pip install '.[optimum]'",
    ),
]


def optimum_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli with the plug-in of this repository in its namespace."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_optimum_cli_lists_the_command(tmp_path: Path) -> None:
    done = optimum_cli("export", "--help", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "Export an AutoGLM-Phone checkpoint" in " ".join(done.stdout.split())


def test_every_option_but_the_model_is_one_of_autoglm_export(tmp_path: Path) -> None:
    from autoglm_edge.cli import export_command

    done = optimum_cli("export", "autoglm", "--help", cwd=tmp_path)

    own = {name for option in export_command().params for name in (*option.opts, *option.secondary_opts)}
    theirs = set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout.partition("options:")[2]))
    assert done.returncode == 0, done.stderr
    assert {"--int4", "--max-image-tokens", "--resume"} <= theirs
    assert theirs - own == {"--model", "--help"}


def test_export_of_the_pocket_model_writes_a_bundle(tmp_path: Path) -> None:
    done = optimum_cli("export", "autoglm", "--model", "pocket", "--int8", "out", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["recipe"]["name"] == "int8"


def test_a_wrong_checkpoint_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    done = optimum_cli("export", "autoglm", "--model", "./empty", "out", cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
