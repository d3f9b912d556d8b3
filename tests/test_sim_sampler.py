"""Looking at a child: what a sample holds, with groups and without, and that looking costs little."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from autoglm_edge.android_sim.limits.counters import GroupCounters
from autoglm_edge.android_sim.run.sampler import ProcSampler, PsSampler, session_members

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="samples are read from Linux' /proc")


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def process(
    pid: int,
    anon: int,
    *,
    file: int = 0,
    shmem: int = 0,
    swap: int = 0,
    read: int = 0,
    ticks: int = 0,
    session: int = 1,
) -> dict[str, object]:
    """Files of a process; sizes in KiB."""
    return {
        f"proc/{pid}/status": f"Name:\tx\nVmRSS:\t9 kB\nRssAnon:\t  {anon} kB\nRssFile:\t{file} kB\n"
        f"RssShmem:\t{shmem} kB\nVmSwap:\t{swap} kB",
        f"proc/{pid}/io": f"rchar: 1\nread_bytes: {read}\nwrite_bytes: 7",
        f"proc/{pid}/stat": f"{pid} (a) b) S 1 {session} {session} 0 -1 0 0 0 0 0 {ticks} {ticks} 0 0",
    }


def test_a_sample_without_groups_adds_up_the_family(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            **process(1, 100, file=10, shmem=5, swap=3, read=4096, ticks=50),
            **process(2, 20, file=1, read=100, ticks=50),
            **process(9, 999, session=9),
        },
    )
    sampler = ProcSampler(1, GroupCounters(None), time.monotonic(), root=root)

    seen = sampler.sample()

    assert seen is not None
    assert (seen.anon_bytes, seen.shmem_bytes, seen.swap_bytes) == (120 << 10, 5 << 10, 3 << 10)
    assert (seen.file_bytes, seen.read_bytes) == (11 << 10, 4196)
    assert seen.cpu_s == pytest.approx(200 / os.sysconf("SC_CLK_TCK"))
    assert (seen.charged_bytes, seen.refaulted_bytes, seen.psi_some_s) == (None, None, None)
    assert seen.held_bytes == 128 << 10
    assert session_members(1, root / "proc") == [1, 2]
    sampler.close()


def test_a_group_counts_a_shared_page_once_and_keeps_what_dead_members_read(tmp_path: Path) -> None:
    group = {
        "g/cgroup.procs": "1\n2",
        "g/memory.stat": "anon 5000\nshmem 6000\nworkingset_refault_file 2",
        "g/memory.current": 12345,
        "g/memory.swap.current": 7000,
        "g/memory.pressure": "some total=2000000\nfull total=1000000",
        "g/cpu.stat": "usage_usec 3000000",
    }
    root = write(
        tmp_path, {**group, **process(1, 100, file=10, read=1000), **process(2, 100, file=5, read=500)}
    )
    counters = GroupCounters(tmp_path / "g", pressure=tmp_path / "g")
    sampler = ProcSampler(1, counters, time.monotonic(), root=root)

    first = sampler.sample()
    assert first is not None
    assert (first.anon_bytes, first.shmem_bytes, first.swap_bytes) == (5000, 6000, 7000)
    assert (first.file_bytes, first.read_bytes, first.charged_bytes) == (15 << 10, 1500, 12345)
    assert (first.psi_some_s, first.psi_full_s, first.cpu_s) == (2.0, 1.0, 3.0)

    write(root, {"g/cgroup.procs": "1", **process(1, 100, file=10, read=1200)})
    second = sampler.sample()
    assert second is not None and second.read_bytes == 1700
    assert second.at_s >= first.at_s
    sampler.close()
    counters.close()


def test_a_child_that_is_gone_gives_no_sample(tmp_path: Path) -> None:
    write(tmp_path, {"proc/1/status": "Name:\tzombie\nState:\tZ"})

    assert ProcSampler(1, GroupCounters(None), 0.0, root=tmp_path).sample() is None
    assert ProcSampler(5, GroupCounters(None), 0.0, root=tmp_path).sample() is None


@pytest.mark.parametrize("text", ["", "RssAnon: many kB", "\x00\x01", "RssAnon:\t1 kB\nread_bytes: -"])
def test_files_that_are_not_as_expected_do_no_harm(tmp_path: Path, text: str) -> None:
    write(tmp_path, {f"proc/1/{name}": text for name in ("status", "io", "stat")})
    write(
        tmp_path,
        {f"g/{name}": text for name in ("memory.stat", "memory.current", "cpu.stat", "cgroup.procs")},
    )
    counters = GroupCounters(tmp_path / "g", pressure=tmp_path / "g")

    sampler = ProcSampler(1, counters, 0.0, root=tmp_path)

    seen = sampler.sample()
    assert seen is None or seen.anon_bytes >= 0
    sampler.close()
    counters.close()


@linux
def test_this_process_is_seen_as_it_is() -> None:
    sampler = ProcSampler(os.getpid(), GroupCounters(None), time.monotonic())
    sampler.family = lambda: [os.getpid()]  # type: ignore[method-assign]
    before = sampler.sample()
    block = bytearray(os.urandom(16 << 20))
    after = sampler.sample()
    sampler.close()

    assert before is not None and after is not None
    assert after.anon_bytes - before.anon_bytes > 12 << 20, len(block)
    assert after.cpu_s >= before.cpu_s
    assert sampler.cost_s > 0


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ps")
def test_ps_tells_resident_memory() -> None:
    try:
        seen = PsSampler(os.getpid(), time.monotonic()).sample()
    except FileNotFoundError:
        pytest.skip("there is no ps")
    if seen is None:
        pytest.skip("there is no ps, or it tells nothing")

    assert seen.anon_bytes > 10 << 20
    assert PsSampler(2**22 - 1, 0.0).sample() is None
