from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoglm_edge.errors import ExportError
from autoglm_edge.export.journal import Journal, read_journal

DRIVER = Path(__file__).with_name("crash_export.py")


def run_driver(mode: str, checkpoint: Path, folder: Path, most: int) -> dict[str, Any]:
    # One thread per library: the driver forks, and must have no threads when it does.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DRIVER), mode, str(checkpoint), str(folder), "--most", str(most)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_an_export_killed_at_any_call_leaves_nothing_or_a_bundle_and_goes_on_to_the_same_bytes(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    result = run_driver("crash", checkpoint_of("tiny"), tmp_path, 32)

    assert result["died"] > 20


@pytest.mark.slow
def test_a_replacement_killed_at_any_call_keeps_the_old_bundle_or_has_the_new_one(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    result = run_driver("replace", checkpoint_of("tiny"), tmp_path, 24)

    assert result["died"] > 20


@pytest.mark.slow
def test_an_export_killed_at_random_moments_again_and_again_ends_with_the_same_bytes(
    checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    result = run_driver("harass", checkpoint_of("tiny"), tmp_path, 24)

    assert result["died"] > 5


# --- the journal


def written(path: Path) -> None:
    with Journal(path, "abc", "tiny as int4") as journal:
        journal.record("decoder", ["a", "b"])
        journal.record("vision", ["c"])
        journal.record("decoder", ["d"])


def test_a_journal_gives_back_what_was_recorded(tmp_path: Path) -> None:
    written(tmp_path / "journal")

    entries = read_journal(tmp_path / "journal")

    assert entries is not None
    assert (entries.fingerprint, entries.about) == ("abc", "tiny as int4")
    assert entries.finished == {"decoder": {"a", "b", "d"}, "vision": {"c"}}
    assert entries.count == 4
    assert entries.manifest_sha256 is None


def test_a_journal_cut_at_any_byte_gives_back_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    content = path.read_bytes()
    counts = []

    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        entries = read_journal(path)
        counts.append(-1 if entries is None else entries.count)

    assert sorted(set(counts)) == [-1, 0, 2, 3, 4]
    assert counts == sorted(counts)


def test_going_on_with_a_torn_journal_drops_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    path.write_bytes(path.read_bytes()[:-5])
    entries = read_journal(path)

    with Journal(path, "abc", "tiny as int4", entries) as journal:
        journal.record("decoder", ["e"])
        journal.record_manifest("f" * 64)

    again = read_journal(path)
    assert again is not None
    assert again.finished == {"decoder": {"a", "b", "e"}, "vision": {"c"}}
    assert again.manifest_sha256 == "f" * 64


def test_a_missing_or_empty_journal_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")

    assert read_journal(tmp_path / "missing") is None
    assert read_journal(tmp_path / "empty") is None


@pytest.mark.parametrize(
    "content",
    [
        b"[]\n",
        b"1\n",
        b"{}\n",
        b'{"journal": 2, "fingerprint": "", "about": ""}\n',
        b"\xff\xfe\n",
        b"\n",
        b"[" * 99999 + b"\n",
    ],
)
def test_a_journal_of_another_kind_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(content)

    with pytest.raises(ExportError, match="no export journal of this release"):
        read_journal(tmp_path / "journal")
