"""Files that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoglm_edge import embedded
from autoglm_edge.errors import EdgeError


def test_the_pocket_model_lies_in_the_package() -> None:
    folder = embedded.pocket_path()
    assert folder.is_absolute()
    assert folder.name == "pocket"
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_the_sample_screenshot_lies_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(embedded, "pocket_path", lambda: tmp_path)
    with pytest.raises(EdgeError, match="reinstall"):
        embedded.sample_screenshot()
    (tmp_path / embedded.SCREENSHOT_NAME).write_bytes(b"png")
    assert embedded.sample_screenshot() == tmp_path / "screenshot.png"


def test_a_package_without_its_data_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "POCKET_NAME", "gone")
    with pytest.raises(EdgeError, match="reinstall autoglm-edge"):
        embedded.pocket_path()
