"""Saved beginnings of prompts: chains of blocks, their bounds, and files that are not to be trusted."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoglm_edge.runtime.reuse.prefix import BLOCK_TOKENS, PrefixStore, cut
from autoglm_edge.runtime.reuse.prefix_folder import BlockFolder
from autoglm_edge.runtime.reuse.sequence import COLUMNS, shared_length

SEED = b"seed"
ROW_BYTES = 2 * 2 * 1 * 3 * 4
SHAPE = (2, 2, 1, 0, 3)


def keys_of(*ids: int) -> np.ndarray:
    keys = np.zeros((len(ids), COLUMNS), np.int64)
    keys[:, 0] = ids
    return keys


def rows_of(keys: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows that tell which tokens they stand for."""
    sums = np.cumsum(keys[:, 0])[start:stop].astype(np.float32)
    return np.broadcast_to(sums[None, None, None, :, None], (2, 2, 1, stop - start, 3)).copy()


def save(store: PrefixStore, keys: np.ndarray, stop: int | None = None) -> list[tuple[int, int]]:
    """Save a sequence; returns what had to be read for it."""
    read: list[tuple[int, int]] = []

    def reader(start: int, end: int) -> np.ndarray:
        read.append((start, end))
        return rows_of(keys, start, end)

    store.save(keys, len(keys) if stop is None else stop, reader)
    return read


def reach(store: PrefixStore, keys: np.ndarray, limit: int | None = None) -> int:
    """Tokens that the store gives of a sequence, after comparing the rows."""
    chain = store.find(keys, len(keys) if limit is None else limit)
    end = 0
    for block, rows in store.load(chain, 0):
        assert block.start == end
        np.testing.assert_array_equal(rows, rows_of(keys, block.start, block.stop))
        end = block.stop
    return end


def store_of(tokens: int = 10**6, folder: BlockFolder | None = None) -> PrefixStore:
    return PrefixStore(SEED, ROW_BYTES, tokens * ROW_BYTES, folder)


def folder_of(path: Path, limit_bytes: int = 10**9, **changes: Any) -> BlockFolder:
    context: dict[str, Any] = {"bundle": "b", "dtype": np.dtype(np.float32), "row_shape": SHAPE}
    return BlockFolder(path, limit_bytes, **(context | changes))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 100])
def test_what_was_saved_is_found_to_its_last_whole_block(length: int) -> None:
    store = store_of()
    keys = keys_of(*range(length))
    save(store, keys)

    assert reach(store, keys_of(*range(length), 7, 8, 9)) == length // 16 * 16
    assert store.used_bytes == length // 16 * 16 * ROW_BYTES


def test_a_limit_leaves_tokens_to_compute() -> None:
    store = store_of()
    keys = keys_of(*range(96))
    save(store, keys, 70)

    assert [reach(store, keys, limit) for limit in (96, 64, 63, 16, 15, 0)] == [64, 64, 48, 16, 0, 0]


@pytest.mark.parametrize("place", [0, 15, 16, 79])
@pytest.mark.parametrize("column", range(COLUMNS))
def test_one_other_value_anywhere_ends_the_shared_beginning(place: int, column: int) -> None:
    store = store_of()
    keys = keys_of(*range(80))
    save(store, keys)
    other = keys.copy()
    other[place, column] += 1

    assert reach(store, other) == place // BLOCK_TOKENS * BLOCK_TOKENS
    assert shared_length(keys, other) == place


def test_equal_beginnings_are_stored_once() -> None:
    store = store_of()
    save(store, keys_of(*range(64), *[1] * 16))

    assert save(store, keys_of(*range(64), *[2] * 20)) == [(64, 80)]
    assert store.used_bytes == (64 + 16 + 16) * ROW_BYTES


def test_equal_blocks_after_other_tokens_are_not_the_same() -> None:
    store = store_of()
    save(store, keys_of(*[1] * 32, *[5] * 32))

    assert reach(store, keys_of(*[2] * 32, *[5] * 32)) == 0


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    store = store_of(tokens=96)
    talks = [keys_of(*[talk] * 32) for talk in range(4)]
    for keys in talks[:3]:
        save(store, keys)
    reach(store, talks[0])
    save(store, talks[3])

    assert [reach(store, keys) for keys in talks] == [32, 0, 32, 32]
    assert store.used_bytes == 96 * ROW_BYTES


def test_the_end_of_a_conversation_goes_before_its_beginning() -> None:
    store = store_of(tokens=128)
    long = keys_of(*range(100))
    save(store, long)
    save(store, keys_of(*[7] * 64))

    assert reach(store, long) == 64
    assert store.used_bytes == 128 * ROW_BYTES


def test_of_what_is_longer_than_the_memory_the_beginning_is_kept() -> None:
    store = store_of(tokens=70)
    keys = keys_of(*range(220))
    save(store, keys)

    assert reach(store, keys) == 64
    assert store.used_bytes == 64 * ROW_BYTES


def test_no_memory_saves_nothing_and_reads_nothing() -> None:
    store = store_of(tokens=0)

    assert save(store, keys_of(*range(50))) == []
    assert reach(store, keys_of(*range(50))) == 0


# --- on disk


def test_another_process_finds_what_this_one_wrote(tmp_path: Path) -> None:
    keys = keys_of(*range(80))
    save(store_of(folder=folder_of(tmp_path)), keys)

    assert reach(store_of(folder=folder_of(tmp_path)), keys) == 80
    assert reach(store_of(tokens=0, folder=folder_of(tmp_path)), keys) == 80


def test_only_the_user_may_read_what_was_said(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    save(store_of(folder=folder_of(folder)), keys_of(*range(16)))

    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0


KEYS = keys_of(*range(1, 17))


def one_file(folder: Path) -> Path:
    save(store_of(folder=folder_of(folder)), KEYS)
    (file,) = folder.glob("*.kv")
    return file


def test_every_flipped_bit_and_every_cut_is_noticed_and_the_file_is_deleted(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    sound = file.read_bytes()
    flips = [bytes([*sound[:i], sound[i] ^ 1 << i % 8, *sound[i + 1 :]]) for i in range(len(sound))]
    cuts = [sound[:size] for size in range(0, len(sound), 7)]

    for damaged in [*flips, *cuts, sound + b"x", b"\0" * len(sound)]:
        file.write_bytes(damaged)
        assert reach(store_of(folder=folder_of(tmp_path)), KEYS) == 0
        assert not file.exists()

    file.write_bytes(sound)
    assert reach(store_of(folder=folder_of(tmp_path)), KEYS) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"bundle": "other"},
        {"dtype": np.dtype(np.int32)},
        {"dtype": np.dtype(np.float16)},
        {"row_shape": (2, 2, 3, 0, 1)},
        {"row_shape": (1, 2, 2, 0, 3)},
    ],
)
def test_a_file_of_another_bundle_dtype_or_geometry_is_deleted(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    file = one_file(tmp_path)

    assert folder_of(tmp_path, **changes).read(bytes.fromhex(file.stem), 16) is None
    assert not file.exists()


def test_a_sound_file_under_another_name_is_deleted(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    name = next(cut(SEED, keys_of(*[9] * 16), 16)).name
    file.rename(tmp_path / f"{name.hex()}.kv")

    assert reach(store_of(folder=folder_of(tmp_path)), keys_of(*[9] * 16)) == 0
    assert not list(tmp_path.iterdir())


def test_a_damaged_block_ends_the_chain_before_it(tmp_path: Path) -> None:
    keys = keys_of(*range(96))
    save(store_of(folder=folder_of(tmp_path)), keys)
    names = [block.name.hex() for block in cut(SEED, keys, 96)]
    path = tmp_path / f"{names[2]}.kv"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    assert reach(store_of(folder=folder_of(tmp_path)), keys) == 32


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and links")
def test_neither_pipe_nor_link_nor_folder_of_the_right_name_is_read(tmp_path: Path) -> None:
    file = one_file(tmp_path)
    sound = file.read_bytes()
    (tmp_path / "elsewhere").write_bytes(sound)
    name = bytes.fromhex(file.stem)
    folder = folder_of(tmp_path)
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("elsewhere"), file.mkdir):
        file.unlink(missing_ok=True)
        make()
        assert folder.read(name, 16) is None
    assert (tmp_path / "elsewhere").exists()


def test_the_folder_is_bounded_and_the_least_recently_used_is_deleted(tmp_path: Path) -> None:
    talks = [keys_of(*[talk] * 16) for talk in range(4)]
    folder = folder_of(tmp_path, 4000)  # a file has 16 * 48 bytes and a header
    store = store_of(tokens=0, folder=folder)
    for keys in talks[:3]:
        save(store, keys)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    folder = folder_of(tmp_path, size)
    store = store_of(tokens=0, folder=folder)
    assert reach(store, talks[0]) == 16
    save(store, talks[3])

    assert [reach(store, keys) for keys in talks] == [16, 0, 16, 16]


def test_a_smaller_limit_is_kept_from_the_start(tmp_path: Path) -> None:
    save(store_of(folder=folder_of(tmp_path)), keys_of(*range(320)))

    folder_of(tmp_path, 5000)

    assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000


def test_foreign_files_are_left_alone_and_unfinished_ones_are_removed_in_time(tmp_path: Path) -> None:
    part = "0" * 64 + ".kv." + "0" * 16 + ".part"
    for name in ("notes.txt", "x.kv", part, part.replace("0", "1")):
        (tmp_path / name).write_bytes(b"x" * 9000)
    os.utime(tmp_path / part, (0, 0))

    save(store_of(folder=folder_of(tmp_path, 4000)), keys_of(*range(64)))

    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".kv") == [
        part.replace("0", "1"),
        "notes.txt",
    ]
    assert (tmp_path / "x.kv").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_ends_the_writing_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(error, os.strerror(error))

    saved, new = keys_of(*range(48)), keys_of(*range(50, 162))
    save(store_of(folder=folder_of(tmp_path)), saved)
    folder = folder_of(tmp_path)
    store = store_of(folder=folder)
    monkeypatch.setattr(Path, "replace", fail)

    save(store, new)

    assert not folder.writes
    assert len(caplog.records) == 1
    assert not list(tmp_path.glob("*.part"))
    assert reach(store, new) == 112  # in memory
    assert reach(store, saved) == 48  # reading goes on


def test_a_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = store_of(folder=folder_of(tmp_path / "file" / "below"))
    keys = keys_of(*range(48))

    save(store, keys)

    assert reach(store, keys) == 48
    assert "no longer saved" in caplog.text


def test_files_that_vanish_are_as_if_they_had_not_been(tmp_path: Path) -> None:
    keys = keys_of(*range(64))
    store = store_of(tokens=0, folder=folder_of(tmp_path))
    save(store, keys)
    chain = store.find(keys, 64)
    for path in tmp_path.iterdir():
        path.unlink()

    assert list(store.load(chain, 0)) == []
