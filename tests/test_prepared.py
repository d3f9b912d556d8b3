"""Prepared weights: made once, the same answers, and nothing in the cache folder is trusted."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from make_checkpoint import Shape, make_checkpoint

from autoglm_edge.errors import DeviceError
from autoglm_edge.runtime.bundle import Bundle
from autoglm_edge.runtime.machine import packing, prepared
from autoglm_edge.runtime.machine.folders import cache_folder
from autoglm_edge.runtime.machine.prepared import (
    MARKER_NAME,
    LogTell,
    Origin,
    prepare,
    prepared_root,
    prepared_state,
    remove_prepared,
    room_for,
)
from autoglm_edge.runtime.model import Model
from autoglm_edge.runtime.session import SessionOptions

OPTIONS = SessionOptions(threads=1)


class Told(LogTell):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.shown: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.sentences.append(text)

    def show(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        self.shown.append((done_bytes, total_bytes))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOGLM_EDGE_CACHE", str(tmp_path / "prepared weights"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, bundle_of: Callable[..., Path]) -> Bundle:
    """Matrices on both sides of what is kept outside of a prepared graph."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "wide"
    make_checkpoint(checkpoint, Shape(vocab=17000, intermediate=32768))
    return Bundle.open(bundle_of(checkpoint, "int4"))


def logits(bundle: Bundle, weights: str, told: Told | None = None) -> tuple[np.ndarray, Model]:
    """Scores of a prompt and of one more token."""
    model = Model(bundle, SessionOptions(threads=1, weights=weights), told)
    cache = model.new_cache(50)
    ids = np.arange(5, 45)
    positions = np.arange(41)[None].repeat(3, 0)
    rows = [model.forward(model.embed(ids), positions[:, :40], cache, keep=0)]
    rows.append(model.forward(model.embed(ids[:1]), positions[:, 40:], cache))
    return np.concatenate(rows), model


def test_prepared_weights_give_the_very_logits_of_packed_ones(bundle: Bundle) -> None:
    packed, _ = logits(bundle, "packed")
    first, made = logits(bundle, "prepared")
    second, found = logits(bundle, "prepared")

    # The same kernels read the same bytes, from a file instead of a copy: no rounding differs.
    assert (first == packed).all()
    assert (second == packed).all()
    assert made.plan.weights == found.plan.weights == "prepared"
    assert "mapped" in found.plan.weights_reason
    assert found._decoder._model_path == str(prepared_state(bundle, "decoder").graph)


def test_packed_weights_are_in_the_file_and_aligned(bundle: Bundle) -> None:
    graph = prepare(bundle, "decoder", OPTIONS, Told())
    offsets = [int(offset) for offset in packing._PACKED_AT.findall(graph.read_bytes())]

    assert len(offsets) >= 5  # two MLPs and the head
    assert not any(offset % packing.ALIGNMENT for offset in offsets)


def test_a_graph_that_would_compute_something_else_is_never_put_in_place(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # onnxruntime 1.31 packs small tensors at odd addresses, later releases need not.
    with monkeypatch.context() as patch:
        patch.setattr(packing, "is_aligned", lambda graph: False)
        with pytest.raises(DeviceError, match="would compute something else"):
            prepare(bundle, "decoder", OPTIONS, Told())
    results = iter([np.zeros(3), np.zeros(3), np.ones(3)])  # as loaded, maybe once more, from the file
    with monkeypatch.context() as patch:
        patch.setattr(packing, "trial", lambda session, manifest, part: [next(results)])
        patch.setattr(packing, "LEAST_BYTES", (1 << 20, 1 << 20))
        patch.setattr(packing, "is_aligned", _once_odd())
        with pytest.raises(DeviceError, match="would compute something else"):
            prepare(bundle, "decoder", OPTIONS, Told())

    assert not prepared_state(bundle, "decoder").ready


def _once_odd() -> Callable[[Path], bool]:
    """Not aligned the first time it is asked."""
    answers = iter([False])
    return lambda graph: next(answers, True)


def test_addresses_are_read_from_what_was_saved(tmp_path: Path) -> None:
    graph = tmp_path / "decoder.onnx"
    graph.write_bytes(b"..MatMulNBits+1|4096;128..MatMul+2|64;9..")
    assert packing.is_aligned(graph)
    graph.write_bytes(b"..MatMulNBits+1|4096;128..MatMul+2|72;9..")
    assert not packing.is_aligned(graph)


def test_prepared_weights_are_made_once(bundle: Bundle) -> None:
    told = Told()
    graph = prepare(bundle, "decoder", OPTIONS, told)
    before = graph.stat()
    again = prepare(bundle, "decoder", OPTIONS, told)

    assert again == graph
    assert (graph.stat().st_ino, graph.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert told.shown[-1][0] == told.shown[-1][1] > 0
    assert sorted(path.name for path in prepared_root().iterdir()) == [
        Origin.of(bundle, "decoder").key,
        f"{Origin.of(bundle, 'decoder').key}.lock",
    ]
    assert sorted(path.name for path in graph.parent.iterdir()) == [
        "decoder.onnx",
        "decoder.onnx.data",
        MARKER_NAME,
    ]


def test_what_is_made_does_not_depend_on_the_number_of_threads(bundle: Bundle) -> None:
    graph = prepare(bundle, "decoder", OPTIONS, Told())
    one = json.loads((graph.parent / MARKER_NAME).read_bytes())
    remove_prepared(bundle)
    graph = prepare(bundle, "decoder", SessionOptions(threads=2), Told())

    assert json.loads((graph.parent / MARKER_NAME).read_bytes()) == one


def test_each_part_bundle_cpu_and_release_has_a_folder_of_its_own(bundle: Bundle) -> None:
    origin = Origin.of(bundle, "decoder")
    others = [
        dataclasses.replace(origin, part="vision"),
        dataclasses.replace(origin, bundle="0" * 64),
        dataclasses.replace(origin, instruction_set="x86_64"),
        dataclasses.replace(origin, onnxruntime="1.0"),
    ]

    assert len({origin.key, *(other.key for other in others)}) == 5


def cut_data(folder: Path) -> None:
    data = folder / "decoder.onnx.data"
    os.truncate(data, data.stat().st_size - 1)


def zero_data(folder: Path) -> None:
    data = folder / "decoder.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))


def change_graph(folder: Path) -> None:
    graph = folder / "decoder.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)


def foreign_marker(folder: Path) -> None:
    marker = json.loads((folder / MARKER_NAME).read_bytes())
    (folder / MARKER_NAME).write_text(json.dumps(marker | {"bundle": "0" * 64}))


def other_release(folder: Path) -> None:
    marker = json.loads((folder / MARKER_NAME).read_bytes())
    (folder / MARKER_NAME).write_text(json.dumps(marker | {"version": 99}))


def no_marker(folder: Path) -> None:
    (folder / MARKER_NAME).unlink()


def marker_is_text(folder: Path) -> None:
    (folder / MARKER_NAME).write_text("prepared")


def marker_is_a_list(folder: Path) -> None:
    (folder / MARKER_NAME).write_text("[]")


def marker_is_deep(folder: Path) -> None:
    (folder / MARKER_NAME).write_text("[" * 60_000)


def marker_is_huge(folder: Path) -> None:
    (folder / MARKER_NAME).write_text(" " * 100_000)


def marker_is_a_folder(folder: Path) -> None:
    (folder / MARKER_NAME).unlink()
    (folder / MARKER_NAME).mkdir()


def no_data(folder: Path) -> None:
    (folder / "decoder.onnx.data").unlink()


def data_is_a_link(folder: Path) -> None:
    shutil.move(folder / "decoder.onnx.data", folder.parent.parent / "elsewhere")
    (folder / "decoder.onnx.data").symlink_to(folder.parent.parent / "elsewhere")


def folder_is_a_link(folder: Path) -> None:
    shutil.move(folder, folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def folder_is_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("prepared")


def others_may_write(folder: Path) -> None:
    folder.chmod(0o777)


HARM = [
    (cut_data, "bytes, but"),
    (zero_data, "damaged"),
    (change_graph, "damaged"),
    (foreign_marker, "another bundle"),
    (other_release, "another release"),
    (no_marker, "is missing"),
    (marker_is_text, "no marker"),
    (marker_is_a_list, "another release"),
    (marker_is_deep, "no marker"),
    (marker_is_huge, "no marker"),
    (marker_is_a_folder, "not a plain file"),
    (no_data, "is missing"),
    (data_is_a_link, "not a plain file"),
    (folder_is_a_link, "not a plain folder"),
    (folder_is_a_file, "not a plain folder"),
    (others_may_write, "another user"),
]


@pytest.mark.parametrize(("harm", "reason"), HARM, ids=[harm.__name__ for harm, _ in HARM])
def test_what_is_not_as_it_was_made_is_noticed_and_made_again(
    bundle: Bundle, harm: Callable[[Path], None], reason: str
) -> None:
    folder = prepare(bundle, "decoder", OPTIONS, Told()).parent
    elsewhere = folder.parent.parent / "elsewhere"
    harm(folder)
    kept = elsewhere.exists()
    state = prepared_state(bundle, "decoder")

    assert not state.ready
    assert reason in state.reason
    prepare(bundle, "decoder", OPTIONS, Told())
    assert prepared_state(bundle, "decoder").ready
    assert elsewhere.exists() == kept, "what a link leads to is not ours to delete"


def test_a_graph_that_onnxruntime_refuses_is_deleted_and_done_without(bundle: Bundle) -> None:
    packed, _ = logits(bundle, "packed")
    graph = prepare(bundle, "decoder", OPTIONS, Told())
    graph.write_bytes(b"no graph")
    marker = json.loads((graph.parent / MARKER_NAME).read_bytes())
    marker |= prepared._describe(graph, graph.with_name("decoder.onnx.data"))
    (graph.parent / MARKER_NAME).write_text(json.dumps(marker))
    told = Told()
    found, model = logits(bundle, "prepared", told)

    assert (found == packed).all()
    assert model.plan.weights == "packed"
    assert any("loaded without prepared weights" in sentence for sentence in told.sentences)
    assert not graph.exists()


def test_a_disk_without_room_is_a_sentence_and_the_bundle_runs_all_the_same(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda path: usage)
    told = Told()

    assert "are free" in room_for(bundle, "decoder")
    with pytest.raises(DeviceError, match="no prepared weights for decoder: they take"):
        prepare(bundle, "decoder", OPTIONS, told)
    _, model = logits(bundle, "prepared", told)
    assert model.plan.weights == "packed"
    assert "are free" in model.plan.weights_reason
    assert any("no prepared weights" in sentence for sentence in told.sentences)


def test_too_little_memory_to_pack_in_is_a_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "available_bytes", lambda: 1000)

    with pytest.raises(DeviceError, match="packing takes"):
        prepare(bundle, "decoder", OPTIONS, Told())


def test_a_disk_that_fills_up_while_they_are_written_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    # A limit on the size of files fails writes as a full disk does.
    code = (
        "import resource, sys; from autoglm_edge.runtime import bundle, session\n"
        "from autoglm_edge.runtime.machine import prepared\n"
        "from autoglm_edge.errors import EdgeError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: prepared.prepare(bundle.Bundle.open(sys.argv[1]), 'decoder', session.SessionOptions(threads=1),"
        " prepared.LogTell())\n"
        "except EdgeError as error: print('told:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.startswith("told: ")
    assert not prepared_state(bundle, "decoder").ready
    assert [path.suffix for path in prepared_root().iterdir()] == [".lock"]


@pytest.mark.parametrize("where", ["cache", "rename"])
def test_a_cache_folder_that_cannot_be_written_is_a_sentence(
    bundle: Bundle, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "cache":
        cache_folder().write_text("a file where a folder should be")
    else:

        def refuse(*paths: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system", str(paths[0]))

        monkeypatch.setattr(prepared.os, "rename", refuse)

    with pytest.raises(DeviceError, match=r"cannot be written .*AUTOGLM_EDGE_CACHE"):
        prepare(bundle, "decoder", OPTIONS, Told())
    told = Told()
    _, model = logits(bundle, "prepared", told)
    assert model.plan.weights == "packed"
    assert not list(cache_folder().glob("prepared/*.part-*"))


def test_two_processes_at_once_make_one_folder(bundle: Bundle) -> None:
    code = (
        "import sys; from autoglm_edge.runtime import bundle, session\n"
        "from autoglm_edge.runtime.machine import prepared\n"
        "opened, options = bundle.Bundle.open(sys.argv[1]), session.SessionOptions(threads=1)\n"
        "print(prepared.prepare(opened, 'decoder', options, prepared.LogTell()))"
    )
    command = [sys.executable, "-c", code, str(bundle.path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0] for process in both}

    assert [process.returncode for process in both] == [0, 0]
    assert printed == {f"{prepared_state(bundle, 'decoder').graph}\n"}
    assert prepared_state(bundle, "decoder").ready
    assert len(list(prepared_root().iterdir())) == 2


def test_whoever_comes_second_says_that_it_waits(bundle: Bundle) -> None:
    told = Told()
    path = prepared_root() / f"{Origin.of(bundle, 'decoder').key}.lock"
    path.parent.mkdir(parents=True, mode=0o700)
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare, args=(bundle, "decoder", OPTIONS, told))
        thread.start()
        while not told.sentences:
            thread.join(0.01)
            assert thread.is_alive()
        assert not prepared_state(bundle, "decoder").ready
    thread.join()

    assert "Another process is preparing these weights" in told.sentences[0]
    assert prepared_state(bundle, "decoder").ready


def test_what_a_killed_process_left_is_cleared(bundle: Bundle) -> None:
    left = prepared_root() / f"{Origin.of(bundle, 'decoder').key}.part-1"
    left.mkdir(parents=True)
    (left / "decoder.onnx.data").write_bytes(bytes(100))
    prepare(bundle, "decoder", OPTIONS, Told())

    assert not left.exists()


def test_removing_deletes_this_bundles_and_no_other(bundle: Bundle) -> None:
    prepare(bundle, "decoder", OPTIONS, Told())
    prepare(bundle, "vision", OPTIONS, Told())
    size = sum(prepared_state(bundle, part).bytes for part in ("decoder", "vision"))
    other = prepared_root() / "0123456789abcdef-decoder-0123456789abcdef"
    other.mkdir()

    assert remove_prepared(bundle) == size > 0
    assert list(prepared_root().iterdir()) == [other]
    assert remove_prepared(bundle) == 0


def test_prepared_weights_of_integers_give_the_very_logits_of_packed_ones(
    tmp_path_factory: pytest.TempPathFactory, bundle_of: Callable[..., Path]
) -> None:
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "wide"
    make_checkpoint(checkpoint, Shape(vocab=17000, intermediate=32768))
    integer = Bundle.open(bundle_of(checkpoint, "int8"))
    packed, _ = logits(integer, "packed")
    found, model = logits(integer, "prepared")

    assert integer.manifest.parts["decoder"].integer
    assert model.plan.weights == "prepared"
    assert (found == packed).all()


def test_a_user_without_a_home_runs_without_prepared_weights(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AUTOGLM_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    told = Told()

    assert "AUTOGLM_EDGE_CACHE" in prepared_state(bundle, "decoder").reason
    assert "AUTOGLM_EDGE_CACHE" in room_for(bundle, "decoder")
    _, model = logits(bundle, "prepared", told)
    assert model.plan.weights == "packed"
    assert "no home folder" in told.sentences[-1]


def test_who_passes_nobody_to_tell_finds_the_sentences_in_the_log(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepared, "available_bytes", lambda: 1000)
    logits(bundle, "prepared")

    assert "Preparing" in caplog.text
    assert "packing takes" in caplog.text


def test_the_cache_folder_is_where_the_system_keeps_such_things(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "prepared weights"
    monkeypatch.delenv("AUTOGLM_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "autoglm-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/autoglm-edge"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library/Caches/autoglm-edge"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert cache_folder() == tmp_path / "Local/autoglm-edge"
