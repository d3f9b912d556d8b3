"""Checkpoints, bundles and reference models that tests share: each made once per run, in a temporary folder.

Nothing here reaches the network, and nothing is written outside pytest's folders.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from make_checkpoint import make_checkpoint


@pytest.fixture(autouse=True)
def _state_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, and none goes to a hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("AUTOGLM_EDGE_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random checkpoint by shape name and options of `make_checkpoint`."""

    @functools.cache
    def make(shape: str = "tiny", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / shape
        make_checkpoint(folder, shape, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundle of a checkpoint folder, by precision and options of `export`."""
    from autoglm_edge.export.pipeline import export

    @functools.cache
    def make(checkpoint: Path, precision: str = "fp32", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("bundle") / precision
        export(checkpoint, folder, precision=precision, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def engine_of(bundle_of: Callable[..., Path]) -> Iterator[Callable[..., Any]]:
    """A loaded engine of a checkpoint folder."""
    from autoglm_edge.runtime.engine import Engine

    @functools.cache
    def make(checkpoint: Path, precision: str = "fp32", **options: Any) -> Engine:
        return Engine.load(bundle_of(checkpoint, precision, **options), threads=2)

    yield make


@pytest.fixture(scope="session")
def reference_of() -> Callable[[Path], Any]:
    """The transformers model of a checkpoint folder, fp32, on the CPU."""
    import torch
    from transformers import Glm4vForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()

    @functools.cache
    def make(checkpoint: Path) -> Any:
        return Glm4vForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three pictures of different sizes: portrait, landscape, and one that is scaled down."""
    rng = np.random.default_rng(7)
    sizes = [(126, 210), (180, 90), (700, 1200)]
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes
    ]
