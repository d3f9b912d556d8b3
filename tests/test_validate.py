"""Validation of bundles: good ones pass, and planted faults are found and named.

The model is tiny and random. Its distributions are flat, so tests that are not about the limits of trained
models bring limits of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from parity_fixtures import edit_weights, prompt_file

import autoglm_edge
from autoglm_edge.cli import cli
from autoglm_edge.errors import BundleError, ParityError, RequestError
from autoglm_edge.parity.limits import LIMITS, Limits
from autoglm_edge.parity.page import html_page
from autoglm_edge.parity.record import record
from autoglm_edge.parity.report import Report
from autoglm_edge.parity.stamp import write_figures
from autoglm_edge.parity.validate import validate
from autoglm_edge.runtime.bundle import Bundle

LOOSE = Limits("loose", 0.02, 0.2, 0.0, 0.99, 1.0)
"""Holds for a random model in int4, whose mean KL is about 0.01."""


@pytest.fixture(scope="session")
def checkpoint(checkpoint_of: Callable[..., Path]) -> Path:
    return checkpoint_of("tiny", dtype="float32")


@pytest.fixture(scope="session")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    output = folder / "ref.safetensors"
    record(checkpoint, output, prompts=str(prompt_file(folder)))
    return output


@pytest.fixture(scope="session")
def good(checkpoint: Path, bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint, "fp32")


def failed(report: Report) -> set[str]:
    return {item.name for item in report.criteria if not item.kept}


def faults(report: Report) -> set[str]:
    return {fault.what for fault in report.faults}


# --- bundles as they should be


def test_an_fp32_bundle_passes_the_strictest_limits(good: Path, reference: Path) -> None:
    report = validate(good, reference)

    own = report.candidate
    assert report.passed
    assert own is not None
    assert own.answer.kl.mean < 1e-9
    assert (own.same_answers.hits, own.same_answers.total) == (4, 4)
    assert own.answer.top1.value == 1
    assert own.least_vision_cosine > 0.99999
    assert [outcome.case for outcome in own.images] == [
        "image-en-0",
        "images-en-0",
        "images-en-0",
        "tap-en-0",
    ]
    assert report.faults == ()


def test_int8_is_much_nearer_than_int4(
    checkpoint: Path, bundle_of: Callable[..., Path], reference: Path
) -> None:
    figures = {}
    for precision in ("fp32", "fp16", "int8", "int4"):
        report = validate(bundle_of(checkpoint, precision), reference, limits=LOOSE)
        assert report.candidate is not None
        assert report.passed, report.to_table()
        figures[precision] = report.candidate.answer.kl.mean

    assert figures["fp32"] < figures["fp16"] / 10
    assert figures["fp16"] < figures["int8"]
    assert figures["int8"] < figures["int4"] / 10


def test_limits_follow_the_recipe_and_can_be_chosen(
    checkpoint: Path, bundle_of: Callable[..., Path], good: Path, reference: Path
) -> None:
    report = validate(bundle_of(checkpoint, "int4"), reference, limits="fp32")

    assert report.limits == "fp32"
    assert "mean KL divergence" in failed(report)
    assert validate(good, reference).limits == "fp32"
    with pytest.raises(RequestError, match="no limits 'int3'"):
        validate(good, reference, limits="int3")


# --- planted faults


def test_swapped_position_axes_are_found(
    good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_edge.runtime.prompt import build as prompt

    right = prompt.image_positions

    def swapped(*arguments: Any) -> Any:
        positions, following = right(*arguments)
        return positions[[0, 2, 1]], following

    monkeypatch.setattr(prompt, "image_positions", swapped)
    report = validate(good, reference)

    assert faults(report) == {"positions"}
    assert "height" in report.faults[0].detail
    assert {"mean KL divergence", "inputs that differ from the recorded ones"} <= failed(report)


def test_a_shifted_image_grid_is_found(good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoglm_edge.runtime.prompt import build as prompt

    right = prompt.image_positions

    def shifted(ids: Any, grids: Any, token: int, merge: int) -> Any:
        positions, following = right(ids, grids, token, merge)
        positions[2, np.asarray(ids) == token] += 1
        return positions, following

    monkeypatch.setattr(prompt, "image_positions", shifted)
    report = validate(good, reference)

    assert faults(report) == {"positions"}
    assert "width" in report.faults[0].detail
    assert report.candidate is not None
    # A shift of one column moves little in a model with few rotary pairs; rounding moves 1e-13.
    assert report.candidate.groups["image"].kl.mean > 1e-9


def test_a_vision_tower_that_mixes_up_rows_and_columns_is_found(
    good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_edge.runtime.model import Model

    right = Model.encode_image

    def mixed(self: Model, image: Any) -> Any:
        frames, height, width = image.grid
        return right(self, dataclasses.replace(image, grid=(frames, width, height)))

    monkeypatch.setattr(Model, "encode_image", mixed)
    report = validate(good, reference)

    assert report.faults == ()
    assert {"mean cosine of vision features", "mean KL divergence"} <= failed(report)


def test_rotary_sections_in_the_wrong_order_inside_the_graph_are_found(
    checkpoint: Path, reference: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    rope = next(
        block
        for block in config["text_config"].values()
        if isinstance(block, dict) and "mrope_section" in block
    )
    assert rope["mrope_section"] == [1, 1, 2]
    rope["mrope_section"] = [2, 1, 1]
    (other / "config.json").write_text(json.dumps(config))
    bundle = autoglm_edge.export(other, tmp_path / "out", precision="fp32")
    disguise(bundle.path, checkpoint)

    report = validate(bundle.path, reference)

    assert report.faults == ()
    assert report.candidate is not None
    assert "mean KL divergence" in failed(report)
    assert report.candidate.groups["text"].kl.mean < 1e-9  # text has one position on all axes
    assert report.candidate.groups["image"].kl.mean > 1e-6


def disguise(bundle: Path, checkpoint: Path) -> None:
    """Let a bundle say that it comes from this checkpoint."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest()
    manifest["source"]["config_sha256"] = digest
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_wrong_zero_points_are_found(
    checkpoint: Path, bundle_of: Callable[..., Path], reference: Path, tmp_path: Path
) -> None:
    right = bundle_of(checkpoint, "int4")
    wrong = edit_weights(
        right,
        tmp_path / "wrong",
        "decoder",
        lambda name: "layers.0" in name and "zero_point" in name,
        lambda packed: (packed & 0xF0) | (((packed & 0x0F) + 1) & 0x0F),  # every second block is off by one
    )

    report = validate(wrong, reference, limits=LOOSE)

    assert validate(right, reference, limits=LOOSE).passed
    assert "mean KL divergence" in failed(report)


def test_the_weights_of_another_norm_are_found(good: Path, reference: Path, tmp_path: Path) -> None:
    wrong = edit_weights(
        good,
        tmp_path / "wrong",
        "decoder",
        lambda name: name.endswith("layers.1.post_self_attn_layernorm.weight"),
        lambda weight: np.roll(weight, 1),
    )

    report = validate(wrong, reference)

    assert {"mean KL divergence", "99th percentile of KL"} <= failed(report)


def test_a_flipped_bit_in_the_vision_tower_is_found(good: Path, reference: Path, tmp_path: Path) -> None:
    wrong = edit_weights(good, tmp_path / "sign", "vision", is_first_norm, lambda weight: flip(weight, 31))

    report = validate(wrong, reference)

    assert "mean cosine of vision features" in failed(report)


def test_weights_that_overflow_are_an_error_and_no_figure(
    good: Path, reference: Path, tmp_path: Path
) -> None:
    wrong = edit_weights(good, tmp_path / "nan", "vision", is_first_norm, lambda weight: flip(weight, 30))

    with pytest.raises(BundleError, match="NaN"):
        validate(wrong, reference)


def is_first_norm(name: str) -> bool:
    return name.endswith("blocks.0.norm1.weight")


def flip(weight: np.ndarray, bit: int) -> np.ndarray:
    """One bit of one float32: 31 is the sign, 30 the top of the exponent."""
    changed = weight.copy()
    changed.reshape(-1).view(np.uint32)[5] ^= np.uint32(1 << bit)
    return changed


def test_an_image_that_is_one_row_short_is_found(
    good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_edge.runtime.prompt import image

    right = image.fit

    def short(height: int, width: int, spec: Any) -> tuple[int, int]:
        fitted = right(height, width, spec)
        side = spec.patch_size * spec.merge_size
        return (fitted[0] - side, fitted[1]) if fitted[0] > 8 * side else fitted

    monkeypatch.setattr(image, "fit", short)
    report = validate(good, reference)

    assert faults(report) == {"grid", "ids"}
    assert "prompts that could be scored" in failed(report)
    assert report.candidate is not None
    assert report.candidate.cases < report.cases


def test_other_pixel_values_are_found(good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoglm_edge.runtime.prompt.image import PatchedImage

    right = PatchedImage.pixel_values.fget
    assert right is not None
    monkeypatch.setattr(PatchedImage, "pixel_values", property(lambda self: right(self) + np.float32(1e-3)))

    assert faults(validate(good, reference)) == {"patches"}


def test_a_template_that_adds_a_newline_is_found(
    good: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoglm_edge.runtime.engine import Engine

    right = Engine.__init__

    def newline(self: Engine, *arguments: Any, **options: Any) -> None:
        right(self, *arguments, **{**options, "image_layout": "newline"})

    monkeypatch.setattr(Engine, "__init__", newline)
    report = validate(good, reference)

    assert faults(report) == {"ids"}
    assert not report.passed


# --- references that do not belong here


def test_a_reference_of_another_model_is_refused(
    reference: Path, checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]
) -> None:
    other = bundle_of(checkpoint_of("odd-axes", dtype="float32"))

    with pytest.raises(ParityError, match=r"was recorded from .* but .* was made from"):
        validate(other, reference)


@pytest.mark.parametrize(
    ("name", "what"), [("tokenizer.json", "tokenizer"), ("chat_template.jinja", "template")]
)
def test_a_bundle_with_another_tokenizer_or_template_is_refused(
    name: str, what: str, good: Path, reference: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(good, other)
    content = (other / name).read_bytes() + b"\n"
    (other / name).write_bytes(content)
    manifest = json.loads((other / "manifest.json").read_text())
    entry = next(entry for entry in manifest["files"] if entry["path"] == name)
    entry["size_bytes"] = len(content)
    (other / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ParityError, match=rf"another .*{what}"):
        validate(other, reference)


def test_another_pixel_budget_is_refused(
    good: Path, reference: Path, checkpoint: Path, tmp_path: Path
) -> None:
    manifest = json.loads((good / "manifest.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(good, other)
    row = 2 * 28 * 28
    manifest["image"]["max_pixels"] -= row
    (other / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(ParityError, match="max_pixels"):
        validate(other, reference)
    with pytest.raises(ParityError, match="--max-image-tokens"):
        validate(good, reference, max_image_tokens=20)


def test_a_smaller_budget_can_be_recorded_and_validated(good: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    record(checkpoint, output, prompts=str(prompt_file(tmp_path)), max_image_tokens=20)

    assert validate(good, output, max_image_tokens=20).passed


# --- floors, baselines, and what is written


@pytest.fixture(scope="session")
def floor(checkpoint: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("floor") / "bf16.safetensors"
    record(checkpoint, output, like=reference, dtype="bfloat16")
    return output


def test_a_floor_is_compared_at_the_same_tokens_and_loosens_the_limits(
    good: Path, reference: Path, floor: Path
) -> None:
    report = validate(good, reference, floor=floor, baselines=[floor])

    assert report.floor is not None
    assert report.candidate is not None
    assert report.floor.title == "floor: bfloat16 on cpu"
    assert [item.title for item in report.baselines] == ["bfloat16 on cpu"]
    assert report.candidate.answer.kl.mean < report.floor.answer.kl.mean < 1e-2
    limit = next(item.limit for item in report.criteria if item.name == "mean KL divergence")
    assert limit == pytest.approx(LIMITS["fp32"].mean_kl + report.floor.answer.kl.mean)
    assert report.columns == [report.candidate, report.floor, *report.baselines]


def test_a_floor_that_was_recorded_on_its_own_is_refused(
    good: Path, reference: Path, checkpoint: Path, tmp_path: Path
) -> None:
    lines = prompt_file(tmp_path).read_text(encoding="utf-8").replace("-0", "-1")
    (tmp_path / "others.jsonl").write_text(lines, encoding="utf-8")
    record(checkpoint, tmp_path / "other.safetensors", prompts=str(tmp_path / "others.jsonl"))

    with pytest.raises(ParityError, match="--like"):
        validate(good, reference, floor=tmp_path / "other.safetensors")


def test_a_floor_of_other_weights_is_refused(
    reference: Path, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    trained_again = checkpoint_of("tiny", dtype="float32", seed=2)

    with pytest.raises(ParityError, match="another weights_sha256"):
        record(trained_again, tmp_path / "floor.safetensors", like=reference)


def test_figures_go_into_manifest_and_card_and_leave_the_fingerprint(
    good: Path, reference: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(good, bundle)
    before = Bundle.open(bundle)
    report = validate(bundle, reference)

    after = write_figures(bundle, report)
    again = write_figures(bundle, report)

    assert after.fingerprint == before.fingerprint
    after.verify()
    assert after.manifest.figures["parity_passed"] is True
    assert after.manifest.figures["kl_mean"] < 1e-9
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "| kl mean |" in card
    assert "not been measured" not in card
    assert card.count("## Figures") == 1
    assert "## Limits" in card
    assert again.manifest == after.manifest
    assert sorted(path.name for path in bundle.iterdir()) == sorted(path.name for path in good.iterdir())


def test_figures_of_other_files_are_not_written(
    good: Path, checkpoint: Path, bundle_of: Callable[..., Path], reference: Path
) -> None:
    report = validate(good, reference)

    with pytest.raises(ParityError, match="validate it again"):
        write_figures(bundle_of(checkpoint, "int8"), report)


def test_the_document_is_strict_json_with_the_intervals_of_shares(good: Path, reference: Path) -> None:
    text = validate(good, reference).to_json()

    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["passed"] is True
    assert document["candidate"]["answer"]["top1"].keys() == {"hits", "total", "share", "low", "high"}
    assert document["candidate"]["actions"]["distance"]["mean"] is None
    assert document["figures"]["same_answers"] == "4/4"


def test_the_page_stands_alone_and_escapes_what_models_say(good: Path, reference: Path) -> None:
    report = validate(good, reference)
    assert report.candidate is not None
    evil = dataclasses.replace(report.candidate.worst[0], before="<script>alert(1)</script>", case="<b>x")
    report = dataclasses.replace(report, candidate=dataclasses.replace(report.candidate, worst=(evil,)))

    page = html_page(report)

    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert re.findall(r"(?:src|href|url)\s*[=(]", page) == []
    assert set(re.findall(r"https?://[^\"]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert page.count("<svg") >= 3
    assert "passed" in page


def test_the_table_names_every_limit_and_the_verdict(good: Path, reference: Path) -> None:
    report = validate(good, reference)

    table = report.to_table()

    assert all(item.name in table for item in report.criteria)
    assert "PASSED by the limits of fp32" in table


# --- the commands


def test_the_command_exits_with_1_below_the_limits(
    checkpoint: Path, bundle_of: Callable[..., Path], good: Path, reference: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    base = ["validate", str(good), "--reference", str(reference), "--threads", "2"]

    fine = CliRunner().invoke(cli, [*base, "--html", str(page), "--json"])
    bad = CliRunner().invoke(
        cli,
        ["validate", str(bundle_of(checkpoint, "int4")), "--reference", str(reference), "--limits", "fp32"],
    )

    assert fine.exit_code == 0, fine.output
    assert json.loads(fine.stdout.splitlines()[-1])["passed"] is True
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "[4/4] tap-en-0" in fine.stderr
    assert bad.exit_code == 1
    assert "FAILED by the limits of fp32" in bad.stdout


def test_the_command_says_in_a_sentence_what_is_wrong(good: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["validate", str(good), "--reference", str(tmp_path / "none")])

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no reference at")


def test_the_record_command_writes_a_reference(checkpoint: Path, tmp_path: Path) -> None:
    prompts, output = prompt_file(tmp_path), tmp_path / "ref.safetensors"
    arguments = ["record", str(checkpoint), "-o", str(output), "--prompts", str(prompts), "--top-k", "8"]

    first = CliRunner().invoke(cli, [*arguments, "--json"])
    second = CliRunner().invoke(cli, arguments)

    assert first.exit_code == 0, first.output
    document = json.loads(first.stdout.splitlines()[-1])
    assert document["prompts"] == 4
    assert document["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert second.exit_code == 1
    assert "--force" in second.stderr
