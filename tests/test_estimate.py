from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_edge.errors import CheckpointError, ExportError
from autoglm_edge.export import forecast
from autoglm_edge.export.pipeline import estimate, export

Checkpoints = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "TRIAL_ROWS", 16)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "block_size": 128, "symmetric": True, "activations": "float16"},
        {"precision": "int4-all", "max_image_tokens": 100},
    ],
)
@pytest.mark.parametrize("shape", ["tiny", "odd-axes"])
def test_an_estimate_gives_the_size_of_the_bundle_to_the_byte(
    shape: str, options: dict[str, Any], checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    guess = estimate(checkpoint_of(shape), tmp_path / "out", **options)

    bundle = export(checkpoint_of(shape), tmp_path / "out", **options)
    assert guess.total_bytes == sum(path.stat().st_size for path in bundle.path.iterdir())
    for part in guess.parts:
        assert part.graph_bytes == bundle.file(f"{part.name}.onnx").stat().st_size
        assert part.data_bytes == bundle.file(f"{part.name}.onnx.data").stat().st_size
        assert part.weight_bytes == bundle.manifest.parts[part.name].weight_bytes
    assert guess.other_bytes == guess.total_bytes - sum(p.graph_bytes + p.data_bytes for p in guess.parts)
    assert guess.kv_bytes_per_token == bundle.manifest.kv_bytes_per_token


def test_an_estimate_writes_nothing(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("tiny")

    estimate(checkpoint, tmp_path / "a" / "out")

    assert list(tmp_path.iterdir()) == []


def test_an_estimate_of_an_existing_output_is_allowed(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    export(checkpoint_of("tiny"), tmp_path / "out")

    assert estimate(checkpoint_of("tiny"), tmp_path / "out").total_bytes > 0


def test_kv_bytes_are_keys_and_values_of_every_layer(checkpoint_of: Checkpoints, tmp_path: Path) -> None:
    full = estimate(checkpoint_of("tiny"), tmp_path / "out", precision="fp32")
    half = estimate(checkpoint_of("tiny"), tmp_path / "out", precision="fp16")

    layers, kv_heads, head_dim = 2, 2, 16
    assert full.kv_bytes_per_token == 2 * layers * kv_heads * head_dim * 4 == 2 * half.kv_bytes_per_token
    assert full.kv_bytes_at_4096 == 4096 * full.kv_bytes_per_token
    assert full.kv_bytes_at_full_context == full.context_length * full.kv_bytes_per_token


def test_a_disk_without_room_is_told_and_not_an_error(
    checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())

    guess = estimate(checkpoint_of("tiny"), tmp_path / "out")

    assert (guess.fits, guess.free_bytes) == (False, 1000)
    assert "NOT ENOUGH" in guess.to_table()


def test_the_table_names_every_part_and_json_has_every_field(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    guess = estimate(checkpoint_of("tiny"), tmp_path / "out")

    table = guess.to_table()
    assert [
        name for name in ("decoder", "embedding", "vision", "KV cache", "bundle") if name not in table
    ] == []
    document = json.loads(guess.to_json())
    assert document["total_bytes"] == guess.total_bytes
    assert [part["name"] for part in document["parts"]] == ["decoder", "embedding", "vision"]
    assert "\n" not in guess.to_json()


def test_time_and_memory_are_positive_and_memory_is_modest(
    checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    guess = estimate(checkpoint_of("tiny"), tmp_path / "out")

    assert 0 < guess.seconds < 60
    assert guess.peak_anonymous_bytes > 1 << 20


@pytest.mark.parametrize(
    ("options", "error"),
    [({"max_image_tokens": 1}, ExportError), ({"revision": "main"}, CheckpointError)],
)
def test_what_an_export_refuses_an_estimate_refuses_too(
    options: dict[str, Any], error: type[Exception], checkpoint_of: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(error):
        estimate(checkpoint_of("tiny"), tmp_path / "out", **options)


def test_an_estimate_says_that_a_disk_is_full_exactly_when_the_export_does(
    checkpoint_of: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, usage = checkpoint_of(), shutil.disk_usage(tmp_path)
    needed = estimate(tiny, tmp_path / "out").missing_bytes

    for free, fits in ((needed, True), (needed - (1 << 20), False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        guess = estimate(tiny, tmp_path / "out")

        assert guess.fits is fits
        assert ("NOT ENOUGH" in guess.to_table()) is not fits
    with pytest.raises(ExportError, match="more bytes, but the disk has"):
        export(tiny, tmp_path / "out")
