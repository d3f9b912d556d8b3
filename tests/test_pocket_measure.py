"""What is measured of the pocket model, and that a folder of measurements is not mixed up with another."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pocket_measure
import pytest
from pocket_measure import Measured, Workspace, rtn_block_32, variants

from autoglm_edge.export.source.checkpoint import Checkpoint
from autoglm_edge.parity.case import Fingerprint
from autoglm_edge.parity.report import Report, Subject
from autoglm_edge.quantize.recipe import PRESETS


def test_every_preset_is_measured_once_and_names_can_be_file_names() -> None:
    chosen = variants()
    names = [item.name for item in chosen]

    assert set(PRESETS) <= set(names)
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)
    ways = {(json.dumps({**item.recipe.to_json(), "name": ""}), item.prefill) for item in chosen}
    assert len(ways) == len(chosen)


def test_the_baseline_to_beat_has_4_bits_in_every_matrix() -> None:
    recipe = rtn_block_32()
    for name in Checkpoint.open("pocket").tensors.names:
        form = recipe.format_for(name)
        if name.endswith("embed_tokens.weight"):
            assert form is not None and form.bits == 8
        elif form is not None and "bias" not in name:
            assert (form.bits, form.block_size, form.symmetric) == (4, 32, False)


def test_refined_variants_take_the_same_bytes_as_what_they_are_compared_with() -> None:
    by_name = {item.name: item.recipe for item in variants()}

    for name, recipe in by_name.items():
        base = "int4" if name.startswith("int4-") else "rtn-b32"
        if name.rpartition("-")[2] in ("search", "gptq", "none"):
            assert [rule.format for rule in recipe.rules] == [rule.format for rule in by_name[base].rules]
            assert recipe != by_name[base]


def test_a_folder_of_other_weights_or_screens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Workspace.open(tmp_path, 5, 1)
    Workspace.open(tmp_path, 5, 2)  # the number of processes changes nothing

    with pytest.raises(SystemExit, match="other weights or screens"):
        Workspace.open(tmp_path, 6, 1)
    monkeypatch.setattr(pocket_measure, "_sha256", lambda path: "another training")
    with pytest.raises(SystemExit, match="other weights or screens"):
        Workspace.open(tmp_path, 5, 1)


def test_a_kept_report_is_used_for_its_recipe_alone_and_judged_by_the_limits_of_today(
    tmp_path: Path,
) -> None:
    workspace = Workspace.open(tmp_path, 5, 1)
    variant = variants()[0]
    mark = Fingerprint(
        "m", None, "", "", "", "", Checkpoint.open("pocket").config.image, "plain", 9, "", "", None, "", 0, {}
    )
    kept = Report(Subject("", "", "m", "fp32", 1), "", "", mark, "old", 5, (), None, None, (), (), 0.0)
    workspace.report(variant).parent.mkdir()
    workspace.report(variant).write_bytes(pickle.dumps(Measured(variant.recipe, 7, kept)))

    found = workspace.measure([variant])[variant.name]

    assert (found["weight_bytes"], found["limits"], found["passed"]) == (7, "fp32", False)
    assert "prompts that could be scored" in workspace.page(variant).read_text("utf-8")
    assert not workspace._is_measured(replace(variant, recipe=PRESETS["fp16"]))
