"""What pictures cost on this machine: kept by a bench, shown by `autoglm info`.

The cache folder is a temporary one (conftest.py); the bench runs on a tiny bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoglm_edge.commands.bench import bench
from autoglm_edge.commands.info import info
from autoglm_edge.measure import costs as module
from autoglm_edge.measure import speed
from autoglm_edge.measure.bandwidth import Limits
from autoglm_edge.measure.costs import ImageCost, known_costs
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.folders import cache_folder


@pytest.fixture(scope="module")
def folder(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Path:
    return bundle_of(checkpoint_of("tiny", dtype="float32"), "int4")


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_limits", lambda threads: Limits(threads, 1e10, 1e11, 4e11))


def run_bench(folder: Path, *more: object) -> None:
    sizes = ("--prefill", "9,20", "--decode-at", "", "--images", "8,12", "--repeat", 1)
    result = CliRunner().invoke(bench, [str(item) for item in (folder, *sizes, *more)])
    assert result.exit_code == 0, result.output


def show_info(folder: Path) -> tuple[str, dict[str, object]]:
    text = CliRunner().invoke(info, [str(folder)])
    document = CliRunner().invoke(info, [str(folder), "--json"])
    assert text.exit_code == document.exit_code == 0
    return text.output, json.loads(document.output.splitlines()[-1])


def kept(folder: Path) -> Path:
    return cache_folder() / "bench" / f"{Bundle.open(folder).fingerprint}.json"


def test_info_says_how_to_measure_what_was_never_measured(folder: Path) -> None:
    text, document = show_info(folder)

    assert "not measured on this machine; run `autoglm bench`" in text
    assert document["image_costs"] is None


def test_info_shows_the_budgets_that_a_bench_measured(folder: Path) -> None:
    run_bench(folder)

    text, document = show_info(folder)

    costs = known_costs(Bundle.open(folder))
    assert costs is not None
    assert [cost.budget for cost in costs.images] == [8, 12]
    assert all(cost.encode_s > 0 and cost.prefill_s and cost.tokens <= cost.budget for cost in costs.images)
    assert document["image_costs"] == json.loads(json.dumps(costs.to_json()))
    assert all(str(cost) in text for cost in costs.images)
    assert f"measured here on {costs.date}" in text


def test_a_bench_with_other_choices_than_the_usual_ones_is_not_kept(folder: Path) -> None:
    run_bench(folder, "--threads", 1)

    assert not kept(folder).exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"date": "x", "processor": "y", "threads": 1, "images": [{"budget": "many"}]}',
        '{"date": "x", "processor": "y", "threads": 1, "images": 5}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_counts_as_not_there(folder: Path, content: str) -> None:
    kept(folder).parent.mkdir(parents=True)
    kept(folder).write_text(content, encoding="latin-1")

    assert known_costs(Bundle.open(folder)) is None


def test_figures_of_another_processor_are_not_shown(folder: Path) -> None:
    run_bench(folder)
    document = json.loads(kept(folder).read_text()) | {"processor": "another one"}
    kept(folder).write_text(json.dumps(document))

    assert known_costs(Bundle.open(folder)) is None


def test_a_cache_folder_that_cannot_be_written_costs_the_bench_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path / "file"))

    run_bench(folder)

    assert known_costs(Bundle.open(folder)) is None


def test_a_cost_is_told_in_readable_units() -> None:
    assert str(ImageCost(1196, 1173, 31.84, 49.0)) == "1,196 → 1,173 tokens: 31.8 s + 49.0 s of prompt"
    assert str(ImageCost(64, 60, 0.0123, None)) == "64 → 60 tokens: 12 ms"
    assert module.ImageCosts("2026-01-01", "p", 2, ()).to_json()["images"] == ()
