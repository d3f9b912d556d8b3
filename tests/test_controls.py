"""The measurement can fail: recipes with too few bits do, on the trained model, and refined ones do not.

A few newly drawn screens are enough to tell them apart; docs/parity/pocket.md has the figures of many.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pocket_prompts
import pytest
from click.testing import CliRunner

from autoglm_edge.cli import cli
from autoglm_edge.embedded import pocket_path
from autoglm_edge.export.pipeline import export
from autoglm_edge.parity.record import record
from autoglm_edge.quantize.recipe import PRESETS

SCREENS = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    lines = [json.dumps(prompt) for prompt in pocket_prompts.prompts("controls", SCREENS, 1)]
    (folder / "screens.jsonl").write_text("\n".join(lines), encoding="utf-8")
    record("pocket", folder / "ref.safetensors", prompts=str(folder / "screens.jsonl"))
    return folder / "ref.safetensors"


@pytest.mark.parametrize("precision", ["int3", "int2"])
def test_too_few_bits_fail_by_divergence(
    precision: str, reference: Path, bundle_of: Callable[..., Path]
) -> None:
    bundle = bundle_of(pocket_path(), precision)

    result = CliRunner().invoke(cli, ["validate", str(bundle), "--reference", str(reference)])

    assert result.exit_code == 1
    assert "FAIL  mean KL divergence" in result.stdout
    assert "FAILED by the limits of int4" in result.stdout
    assert "ok    inputs that differ from the recorded ones: 0" in result.stdout


@pytest.mark.parametrize(("precision", "refine"), [("int8", None), ("int4", None), ("int4", "gptq")])
def test_recipes_that_are_meant_for_use_pass(
    precision: str, refine: str | None, reference: Path, tmp_path: Path
) -> None:
    recipe = PRESETS[precision] if refine is None else PRESETS[precision].with_(refine=refine)
    export("pocket", tmp_path / "bundle", recipe=recipe)

    result = CliRunner().invoke(cli, ["validate", str(tmp_path / "bundle"), "--reference", str(reference)])

    assert result.exit_code == 0, result.stdout
    assert f"PASSED by the limits of {precision}" in result.stdout
