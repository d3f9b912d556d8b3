"""The tensor store: right values in any format and order, and every kind of damage found when it opens."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import make_checkpoint
from safetensors.numpy import save_file

from autoglm_edge.errors import CheckpointError
from autoglm_edge.export.source.tensors import INDEX_NAME, SINGLE_NAME, TensorStore

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path.parent


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorStore.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_stored_values_as_float32(dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((37, 5, 3)).astype(dtype)
    values[0, 0] = [np.inf, -0.0, np.float32(1e-7)]
    save_file({"a": np.zeros(3, np.float32), "w": values}, tmp_path / SINGLE_NAME)
    store = TensorStore.open(tmp_path)
    rows = store.rows("w", 3, 20)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, values.astype(np.float32).reshape(37, 15)[3:20])
    np.testing.assert_array_equal(store.rows("w", 0, 37).reshape(37, 5, 3), values.astype(np.float32))
    assert store.dtype("w") == np.dtype(dtype).name
    assert store.shape("w") == (37, 5, 3)


def test_every_bfloat16_becomes_the_number_it_stands_for(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    save_file({"w": bits.view(ml_dtypes.bfloat16)}, tmp_path / SINGLE_NAME)
    rows = TensorStore.open(tmp_path).rows("w", 0, 256)
    np.testing.assert_array_equal(rows.view(np.uint32), bits.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_permuted_rows_equal_those_of_the_permuted_tensor(dtype: Any, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    values = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    start = data.draw(st.integers(0, shape[axes[0]]))
    stop = data.draw(st.integers(start, shape[axes[0]]))
    with tempfile.TemporaryDirectory() as folder:
        save_file({"w": values}, Path(folder) / SINGLE_NAME)
        rows = TensorStore.open(Path(folder)).rows("w", start, stop, permute=axes)
    turned = np.ascontiguousarray(values.astype(np.float32).transpose(axes))
    np.testing.assert_array_equal(rows, turned.reshape(shape[axes[0]], -1)[start:stop])


def test_large_tensors_are_converted_over_block_borders(tmp_path: Path) -> None:
    bits = np.random.default_rng(2).integers(0, 65536, (3, (1 << 17) + 7), dtype=np.uint16)
    save_file({"w": bits.view(ml_dtypes.bfloat16)}, tmp_path / SINGLE_NAME)
    rows = TensorStore.open(tmp_path).rows("w", 1, 3)
    np.testing.assert_array_equal(rows.view(np.uint32) >> 16, bits[1:])


def test_tensors_that_are_not_aligned_in_the_file_are_read_right(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    header = {"odd": entry(0, 1, [1], "U8"), "w": entry(1, 25, [2, 3])}
    write(tmp_path / SINGLE_NAME, header, b"\7" + values.tobytes())
    np.testing.assert_array_equal(TensorStore.open(tmp_path).rows("w", 0, 2), values.reshape(2, 3))


def test_an_empty_tensor_has_rows_without_values(tmp_path: Path) -> None:
    write(tmp_path / SINGLE_NAME, {"a": entry(0, 4), "none": entry(4, 4, [3, 0])}, b"abcd")
    assert TensorStore.open(tmp_path).rows("none", 1, 3).shape == (2, 0)


def test_many_threads_can_read_and_release_at_once(tmp_path: Path) -> None:
    store = TensorStore.open(make_checkpoint(tmp_path, "tiny", shards=3))
    wanted = {name: store.rows(name, 0, store.shape(name)[0]) for name in store.names}
    barrier = threading.Barrier(8)

    def work(number: int) -> bool:
        barrier.wait()
        good = True
        for name in store.names[number % 5 :]:
            good &= np.array_equal(store.rows(name, 0, store.shape(name)[0]), wanted[name])
            store.release(name)
        return good

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_pages_that_were_read_leave_resident_memory(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident file pages are told by Linux only")

    def resident_file_kib() -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1])

    save_file({"w": np.zeros((1024, 16 * 1024), np.float16)}, tmp_path / SINGLE_NAME)  # 32 MiB
    store = TensorStore.open(tmp_path)
    before = resident_file_kib()
    for start in range(0, 1024, 128):
        store.rows("w", start, start + 128)
    assert resident_file_kib() - before < 4_000
    store.rows("w", 0, 1, permute=(1, 0))
    assert resident_file_kib() - before > 20_000
    store.release("w")
    assert resident_file_kib() - before < 4_000


def test_shards_form_one_store(tmp_path: Path) -> None:
    store = TensorStore.open(make_checkpoint(tmp_path, "tiny", shards=3))
    one = TensorStore.open(make_checkpoint(tmp_path / "one", "tiny"))
    assert len(store.files) == 3
    assert set(store.names) == set(one.names)
    assert store.size_bytes == one.size_bytes == sum(2 * int(np.prod(one.shape(n))) for n in one.names)


def test_a_single_file_wins_over_an_index_as_in_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"w": np.ones((1, 1), np.float32)}, tmp_path / SINGLE_NAME)
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"other": "gone.safetensors"}}')
    assert TensorStore.open(tmp_path).names == ("w",)
    assert "reading the former" in caplog.text


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tiny", shards=2)
    first = TensorStore.open(tmp_path).fingerprint()
    assert first == TensorStore.open(tmp_path).fingerprint()
    assert len(first) == 64
    shard = tmp_path / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(1, 1))
    touched = TensorStore.open(tmp_path).fingerprint()
    make_checkpoint(tmp_path, "tiny", shards=3)
    assert len({first, touched, TensorStore.open(tmp_path).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("name", "start", "stop", "permute", "match"),
    [
        ("gone", 0, 1, None, "has no tensor 'gone'"),
        ("w", 0, 5, None, "4 rows, 0:5"),
        ("w", -1, 2, None, "outside"),
        ("w", 3, 2, None, "outside"),
        ("w", 0, 1, (0, 0), "no rows in axis order"),
        ("w", 0, 1, (1,), "no rows in axis order"),
        ("ids", 0, 1, None, "stored as I64"),
        ("scalar", 0, 1, None, "no rows"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    name: str, start: int, stop: int, permute: tuple[int, ...] | None, match: str, tmp_path: Path
) -> None:
    tensors = {"w": np.ones((4, 2), np.float32), "ids": np.ones(2, np.int64), "scalar": np.float32(1)}
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / SINGLE_NAME)
    with pytest.raises(CheckpointError, match=match):
        TensorStore.open(tmp_path).rows(name, start, stop, permute=permute)


def test_a_file_that_shrinks_while_it_is_read_raises_instead_of_killing(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    store = TensorStore.open(tmp_path)
    os.truncate(tmp_path / SINGLE_NAME, 5000)
    with pytest.raises(CheckpointError, match="changed from"):
        store.rows("lm_head.weight", 0, 10)
    (tmp_path / SINGLE_NAME).unlink()
    with pytest.raises(CheckpointError, match="went away"):
        store.rows("lm_head.weight", 0, 10)


GOOD = b"\0" * 24
DAMAGED: dict[str, tuple[Any, bytes, str]] = {
    "header is a list": ([1], b"", "not a safetensors file"),
    "header is broken": (b'{"a": ', b"", "not valid JSON"),
    "header is not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "header is endless brackets": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "name twice": (b'{"a": {}, "a": {}}', b"", "names 'a' twice"),
    "entry is a number": ({"a": 3}, b"", "lacks dtype, shape or offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"", "lacks dtype"),
    "format unknown": ({"a": entry(0, 4, [1], "Q4_K")}, GOOD[:4], "'Q4_K', an unknown number format"),
    "format is a list": (
        {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
        GOOD[:4],
        "unknown number format",
    ),
    "shape negative": ({"a": entry(0, 4, [-1])}, GOOD[:4], r"has the shape \[-1\]"),
    "shape of booleans": ({"a": entry(0, 4, [True])}, GOOD[:4], "has the shape"),
    "shape is a number": (
        {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
        GOOD[:4],
        "has the shape",
    ),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, GOOD[:4], "offsets"),
    "offsets backwards": ({"a": entry(4, 0, [1])}, GOOD[:4], "its offsets give -4"),
    "offsets of floats": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        GOOD[:4],
        "offsets",
    ),
    "size disagrees with shape": ({"a": entry(0, 8, [3])}, GOOD[:8], "needs 12 bytes, its offsets give 8"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, GOOD[:12], "'b' overlaps"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16)}, GOOD[:16], "'b' leaves a gap"),
    "gap at the start": ({"a": entry(4, 8)}, GOOD[:8], "leaves a gap"),
    "truncated": ({"a": entry(0, 8), "b": entry(8, 16)}, GOOD[:12], "is truncated"),
    "absurdly large": ({"a": entry(0, 4 * 10**18, [10**18])}, GOOD, "is truncated"),
    "bytes left over": ({"a": entry(0, 8)}, GOOD[:12], "4 bytes follow its last tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_found_when_the_store_opens(case: str, tmp_path: Path) -> None:
    header, data, match = DAMAGED[case]
    folder = write(tmp_path / SINGLE_NAME, header, data)
    message = refusal(folder)
    assert re.search(match, message), message
    assert SINGLE_NAME in message


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "only 0 bytes"),
        (b"abc", "only 3 bytes"),
        (b"<!DOCTYPE html><html>Sign in</html>", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (struct.pack("<Q", 500) + b'{"a"', "header alone takes 508 bytes, the file has 12"),
        (struct.pack("<Q", 0) + b'{"a"', "not valid JSON"),
        (struct.pack("<Q", 10**8 + 1) + b'{"a"', "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "run `git lfs pull`"),
        (b"PK\x03\x04" + b"\0" * 40, "not a safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    assert match in refusal(tmp_path)


@given(cut=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_any_truncation_of_any_shard_is_found(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_checkpoint(tmp_path_factory.mktemp("cut"), "odd-axes", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size * cut // 10_001)
    assert shard.name in refusal(folder)


@given(position=st.integers(0, 4000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_header_byte_never_crashes_the_reader(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_checkpoint(tmp_path_factory.getbasetemp() / "flip", "tiny")
    path = folder / SINGLE_NAME
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        store = TensorStore.open(folder)
    except CheckpointError:
        return
    assert store.size_bytes == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_a_missing_shard_is_named_and_counted(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tiny", shards=4)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    message = refusal(tmp_path)
    assert "2 of the 4 weight files" in message
    assert "model-00002-of-00004.safetensors" in message


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("{}", '"weight_map"'),
        ('{"weight_map": {}}', '"weight_map"'),
        ('{"weight_map": {"a": 3}}', "not a file name in its folder"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "not a file name in its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a file name in its folder"),
        ('{"weight_map": {"a": "x\\\\y"}}', "not a file name in its folder"),
        ('{"weight_map": {"a": ""}}', "not a file name in its folder"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_a_bad_index_is_refused(index: str, match: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    assert match in refusal(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "tiny", shards=2)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(shard for shard in index["weight_map"].values() if shard != file)

    def with_map(**changes: str) -> str:
        document = {"weight_map": {**index["weight_map"], **changes}}
        (tmp_path / INDEX_NAME).write_text(json.dumps(document))
        return refusal(tmp_path)

    assert "no file has it" in with_map(ghost=file)
    assert f"it lies in {file}" in with_map(**{name: other})
    del index["weight_map"][name]
    assert "does not list" in with_map()


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.ones((1, 1), np.float32)}, tmp_path / "a.safetensors")
    save_file({"w": np.ones((1, 1), np.float32), "v": np.ones(1, np.float32)}, tmp_path / "b.safetensors")
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}')
    assert "both hold the tensor 'w'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], "holds no weights"),
        (["pytorch_model-00001-of-00002.bin"], "pickled weights"),
        (["model.pth"], "pickled weights"),
        (["AutoGLM-Phone-9B-Q4_K_M.gguf"], "a GGUF file"),
        (["model-00001-of-00002.safetensors"], "but not model.safetensors.index.json"),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter (LoRA)"),
        (["weights.safetensors"], "rename it"),
        (["manifest.json", "decoder.onnx"], "is an exported bundle"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds(
    files: list[str], match: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert match in refusal(tmp_path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).mkdir()
    assert "cannot be read" in refusal(tmp_path)


def test_a_closed_store_lets_its_file_go(tmp_path: Path) -> None:
    store = TensorStore.open(make_checkpoint(tmp_path))
    store.rows("lm_head.weight", 0, 4)
    store.close()
    with pytest.raises(CheckpointError, match="was closed"):
        store.rows("lm_head.weight", 0, 4)
