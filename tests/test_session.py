"""Sessions: buffers that stay bound, and what onnxruntime raises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from autoglm_edge.embedded import pocket_path
from autoglm_edge.errors import BundleError, DeviceError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine.limits import anonymous_bytes
from autoglm_edge.runtime.machine.topology import Threads, usable_cores, usable_cpus
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import (
    MAPPED,
    SessionOptions,
    open_session,
    run_errors,
    session_settings,
)


@pytest.fixture(scope="module")
def bundle(checkpoint_of: Callable[..., Path], bundle_of: Callable[..., Path]) -> Bundle:
    return Bundle.open(bundle_of(checkpoint_of("tiny"), "fp32"))


def test_two_caches_hold_two_sequences_without_touching_each_other(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    rows = np.array([[5, 6, 7], [8, 9, 10]])

    def run(caches: list, steps: list[tuple[int, int]]) -> list[np.ndarray]:
        last = [np.empty(0)] * 2
        for which, step in steps:
            ids = rows[which, step : step + 1]
            last[which] = model.forward(model.embed(ids), np.full((3, 1), step), caches[which])
        return last

    one = model.new_cache(4)
    alone = []
    for which in (0, 1):
        one.clear()
        alone.append(run([one, one], [(which, 0), (which, 1), (which, 2)])[which])
    mixed = run([model.new_cache(4), model.new_cache(9)], [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)])

    assert all((a == b).all() for a, b in zip(alone, mixed, strict=True))
    assert not (alone[0] == alone[1]).all()


def test_runs_of_ever_new_shapes_leave_memory_as_it_was(bundle_of: Callable[..., Path]) -> None:
    """At most 16 MB for 400 shapes; with plans kept for each of them it is hundreds."""
    if anonymous_bytes() is None:
        pytest.skip("this system does not tell anonymous memory")
    model = Model(Bundle.open(bundle_of(pocket_path(), "int4")), SessionOptions(threads=1))
    cache, lengths = model.new_cache(600), iter(np.random.default_rng(0).permutation(range(100, 600)))

    def grown(count: int) -> int:
        for length in itertools.islice(lengths, count):
            cache.clear()
            model.prefill(model.embed(np.full(length, 10)), np.zeros((3, length), np.int64), cache)
        found = anonymous_bytes()
        assert found is not None
        return found

    before = grown(100)
    assert grown(400) - before < 16_000_000


@pytest.mark.parametrize(("cpus", "entry"), [((), ""), ((4, 6, 7), "5,7,8;5,7,8")])
def test_threads_are_kept_on_large_cores(
    monkeypatch: pytest.MonkeyPatch, cpus: tuple[int, ...], entry: str
) -> None:
    monkeypatch.setattr(
        "autoglm_edge.runtime.session.choose_threads", lambda asked: Threads(3, "three", cpus)
    )

    settings = session_settings(SessionOptions())

    assert settings.intra_op_num_threads == 3
    if entry:
        assert settings.get_session_config_entry("session.intra_op_thread_affinities") == entry
    else:
        with pytest.raises(RuntimeError):
            settings.get_session_config_entry("session.intra_op_thread_affinities")


def test_a_session_whose_threads_are_kept_somewhere_computes_the_same(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus = tuple(usable_cpus()[:2])
    if len(cpus) < 2:
        pytest.skip("this system has one CPU, or does not tell")
    ids, positions = np.arange(5, 21), np.arange(16)[None].repeat(3, 0)

    def logits(kept: tuple[int, ...]) -> np.ndarray:
        monkeypatch.setattr(
            "autoglm_edge.runtime.session.choose_threads", lambda asked: Threads(2, "two", kept)
        )
        model = Model(bundle, SessionOptions())
        return model.forward(model.embed(ids), positions, model.new_cache(16), keep=0)

    assert (logits(cpus) == logits(())).all()


def test_keys_and_values_are_written_into_the_buffers_given(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    cache = model.new_cache(4)
    before = {name: value.data_ptr() for name, value in cache.past.items()}
    key = cache.past["past_key_values.0.key"].numpy()
    key[:] = 0

    model.forward(model.embed(np.array([5, 6])), np.arange(2)[None].repeat(3, 0), cache)

    assert {name: value.data_ptr() for name, value in cache.past.items()} == before
    filled = cache.past["past_key_values.0.key"].numpy()[0, 0]
    assert filled[:2].any(axis=1).all()
    assert not filled[2:].any()


def test_logits_of_one_run_survive_the_next(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    cache = model.new_cache(4)
    first = model.forward(model.embed(np.array([5])), np.zeros((3, 1), np.int64), cache)
    kept = first.copy()
    model.forward(model.embed(np.array([6])), np.ones((3, 1), np.int64), cache)

    assert (first == kept).all()


def test_a_forgotten_cache_is_freed_with_its_binding(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1))
    cache = model.new_cache(4)
    model.forward(model.embed(np.array([5])), np.zeros((3, 1), np.int64), cache)
    del cache

    assert len(model._bindings) == 0


def test_a_failing_graph_is_one_sentence_that_names_it(bundle: Bundle) -> None:
    model = Model(bundle, SessionOptions(threads=1))

    with pytest.raises(BundleError, match="the embedding fails in onnxruntime"):
        model.embed(np.array([10**9]))


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to allocate memory for requested buffer"), MemoryError()]
)
def test_missing_memory_is_told_from_a_failing_graph(error: Exception) -> None:
    with pytest.raises(DeviceError, match="not enough memory to run the decoder"), run_errors("the decoder"):
        raise error


def test_an_interrupt_is_not_taken_for_a_failing_graph() -> None:
    with pytest.raises(KeyboardInterrupt), run_errors("the decoder"):
        raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_device_whose_libraries_are_missing_is_refused_and_not_replaced(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if providers[0] in ort.get_available_providers():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)

    with pytest.raises(DeviceError, match="libraries cannot be loaded"):
        open_session(bundle.file("embedding.onnx"), SessionOptions(device="cuda"))


def test_threads_that_are_asked_for_are_taken_and_others_fit_the_machine() -> None:
    assert SessionOptions(threads=3).thread_count == 3
    assert 1 <= SessionOptions().thread_count <= usable_cores()


def test_session_entries_reach_the_session(bundle: Bundle) -> None:
    settings = session_settings(SessionOptions(threads=1), MAPPED)

    assert settings.get_session_config_entry("session.disable_prepacking") == "1"
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    session = open_session(bundle.file("embedding.onnx"), SessionOptions(threads=1), entries=MAPPED)
    assert session.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"


def test_a_graph_that_is_no_graph_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"no graph")

    with pytest.raises(BundleError, match=r"cannot be loaded by onnxruntime .*info --verify"):
        open_session(tmp_path / "decoder.onnx", SessionOptions(threads=1))
