"""Threads and limits of machines that are written down as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from autoglm_edge.runtime.machine import limits as limits_module
from autoglm_edge.runtime.machine.limits import (
    Limits,
    anonymous_bytes,
    available_bytes,
    limits,
    trim_memory,
)
from autoglm_edge.runtime.machine.topology import choose_threads, threads_of

CPU = "sys/devices/system/cpu"


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def siblings(pairs: list[str], name: str = "core_cpus_list") -> dict[str, object]:
    """Files that say which CPUs are threads of one core."""
    files: dict[str, object] = {}
    for pair in pairs:
        first, _, last = pair.partition("-")
        for cpu in range(int(first), int(last or first) + 1):
            files[f"{CPU}/cpu{cpu}/topology/{name}"] = pair
    return files


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_two_threads_of_a_core_count_once(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, siblings(["0-1", "2-3", "4-5", "6-7"], name))

    threads = threads_of(list(range(8)), root)

    assert (threads.count, threads.reason) == (4, "4 cores, 8 CPUs")


def test_cpus_that_this_process_may_not_use_do_not_count(tmp_path: Path) -> None:
    root = write(tmp_path, siblings(["0-1", "2-3", "4-5", "6-7"]))

    assert threads_of([2, 3, 4], root).count == 2


def test_little_cores_of_a_phone_are_left_out(tmp_path: Path) -> None:
    capacity = [250] * 4 + [850] * 3 + [1024]
    files = {f"{CPU}/cpu{cpu}/cpu_capacity": value for cpu, value in enumerate(capacity)}
    threads = threads_of(list(range(8)), write(tmp_path, files))

    assert (threads.count, threads.reason) == (4, "8 cores, 4 of them large")
    assert threads.cpus == (4, 5, 6, 7)


def test_a_process_on_little_cores_uses_them(tmp_path: Path) -> None:
    files = {f"{CPU}/cpu{cpu}/cpu_capacity": 250 if cpu < 4 else 1024 for cpu in range(8)}

    threads = threads_of([0, 1, 2, 3], write(tmp_path, files))
    assert (threads.count, threads.cpus) == (4, ())


def test_efficiency_cores_of_a_hybrid_are_left_out(tmp_path: Path) -> None:
    kinds = {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"}
    root = write(tmp_path, {**siblings(["0-1", "2-3", "4", "5", "6", "7"]), **kinds})

    threads = threads_of(list(range(8)), root)
    assert (threads.count, threads.cpus) == (2, tuple(sorted(threads.cpus)))
    assert len(threads.cpus) == 2
    assert threads_of([4, 5, 6], root).count == 3


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/app/in", "sys/fs/cgroup/app/cpu.max": "100000 100000"}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/app\n0::/",
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": 300000,
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": 100000,
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/app",
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": 100000,
            },
            4,
        ),
        ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "what 0"}, 4),
        ({"proc/self/cgroup": "no colons at all"}, 4),
    ],
)
def test_a_quota_of_cpu_time_bounds_the_threads(tmp_path: Path, files: dict[str, object], count: int) -> None:
    assert threads_of([0, 1, 2, 3], write(tmp_path, files)).count == count


def test_a_machine_that_tells_nothing_gets_a_thread_per_cpu(tmp_path: Path) -> None:
    assert threads_of([0, 1, 2], tmp_path).count == 3
    assert limits(tmp_path) == Limits(None, None)
    assert available_bytes(tmp_path) is None
    assert anonymous_bytes(tmp_path) is None


def test_what_is_asked_for_is_not_questioned(tmp_path: Path) -> None:
    assert choose_threads(7, tmp_path).count == 7


def test_a_memory_limit_counts_what_is_used_but_not_clean_pages(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/app"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app",
            "proc/meminfo": "MemTotal: 30000 kB\nMemAvailable:   20000 kB",
            f"{group}/memory.max": 10_000_000,
            f"{group}/memory.current": 7_000_000,
            f"{group}/memory.stat": "anon 3000000\nactive_file 1500000\ninactive_file 2500000",
        },
    )

    assert limits(root).free_bytes == 7_000_000
    assert available_bytes(root) == 7_000_000


@pytest.mark.parametrize("limit", [9223372036854771712, "max", "", "many"])
def test_no_memory_limit_leaves_what_the_system_has(tmp_path: Path, limit: object) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/app",
            "proc/meminfo": "MemAvailable:   20000 kB",
            "sys/fs/cgroup/memory/app/memory.limit_in_bytes": limit,
            "sys/fs/cgroup/memory/app/memory.usage_in_bytes": 5,
        },
    )

    assert available_bytes(root) == 20000 * 1024


def test_a_full_group_has_nothing_left(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 1000,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 4000,
            "sys/fs/cgroup/memory/memory.stat": "total_active_file 10",
        },
    )

    assert limits(root).free_bytes == 0


def test_memory_is_given_back_where_the_c_library_can_and_elsewhere_that_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trim_memory()
    monkeypatch.setattr(limits_module.ctypes, "CDLL", lambda name: object())
    trim_memory()
