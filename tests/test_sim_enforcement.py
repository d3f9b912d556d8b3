"""Limits: which mechanism a host offers, what each writes, and that nothing of it stays behind.

Hosts are written down as files; where this machine is root and offers the real thing, that is used as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.limits import journal as journals
from autoglm_edge.android_sim.limits import launch
from autoglm_edge.android_sim.limits.cgroup_v1 import CgroupV1
from autoglm_edge.android_sim.limits.cgroup_v2 import CgroupV2
from autoglm_edge.android_sim.limits.counters import PAGE_BYTES, GroupCounters
from autoglm_edge.android_sim.limits.enforcement import choose_enforcement, offered
from autoglm_edge.android_sim.limits.groups import PREFIX, Group, members, remove_group
from autoglm_edge.android_sim.limits.journal import Journal, is_alive, owner_name, undo_leftovers
from autoglm_edge.android_sim.limits.mechanism import clean_up
from autoglm_edge.android_sim.limits.mounts import hierarchies, v1_parent, v2_parent
from autoglm_edge.android_sim.limits.page_cache import Dropped, cached_bytes, drop_files
from autoglm_edge.android_sim.limits.readahead import ReadAhead, undo_readahead
from autoglm_edge.android_sim.limits.rlimit import DataLimit
from autoglm_edge.android_sim.limits.throttle import Throttle, whole_disk
from autoglm_edge.android_sim.limits.watchdog import Nothing, Watchdog
from autoglm_edge.android_sim.limits.zram import Zram, swap_header, undo_zram, why_not
from autoglm_edge.android_sim.trace import Sample
from autoglm_edge.errors import SimulationError

MIB = 1 << 20
GONE = f"{owner_name(0).split('-')[0]}-999999999-1-0"
"""Name of a run whose process is no more."""


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def budget(limit_mib: int = 256, swap_mib: int = 0, **others: float) -> Budget:
    return Budget("test", "visible", limit_mib * MIB, swap_mib * MIB, **others)  # type: ignore[arg-type]


def mount(point: str, kind: str, options: str, inside: str = "/") -> str:
    return f"30 20 0:30 {inside} {point} rw,nosuid,nodev,noexec,relatime shared:9 - {kind} none rw,{options}"


def v1_host(root: Path, own: str = "/app", **files: object) -> Path:
    """A host with the memory and cpu controllers of version 1 and a unified tree for pressure."""
    base = "sys/fs/cgroup"
    return write(
        root,
        {
            "proc/self/cgroup": f"4:memory:{own}\n3:cpu,cpuacct:/\n0::/",
            "proc/self/mountinfo": "\n".join(
                [
                    mount("/", "ext4", "x"),
                    mount("/sys/fs/cgroup/memory", "cgroup", "memory"),
                    mount("/sys/fs/cgroup/cpu", "cgroup", "cpu,cpuacct"),
                    mount("/sys/fs/cgroup/unified", "cgroup2", "nsdelegate"),
                ]
            ),
            f"{base}/memory/cgroup.procs": "",
            f"{base}/memory{own}/cgroup.procs": "",
            f"{base}/memory{own}/memory.stat": "hierarchical_memory_limit 9223372036854771712",
            f"{base}/cpu/cgroup.procs": "",
            f"{base}/unified/cgroup.procs": "",
            f"{base}/unified/cgroup.subtree_control": "",
            f"{base}/unified/cgroup.controllers": "",
            **files,
        },
    )


def v2_host(root: Path, own: str = "/user.slice/app", handed: str = "/user.slice", **files: object) -> Path:
    """A host with version 2, where one group above this process hands the memory controller on."""
    base = "sys/fs/cgroup"
    tree = {
        f"{base}{folder}/{name}": value
        for folder in ("", "/user.slice", own)
        for name, value in (
            ("cgroup.procs", ""),
            ("cgroup.subtree_control", "memory cpu" if folder == handed else ""),
            ("memory.max", "max"),
        )
    }
    return write(
        root,
        {
            "proc/self/cgroup": f"0::{own}",
            "proc/self/mountinfo": mount("/sys/fs/cgroup", "cgroup2", "nsdelegate"),
            f"{base}/cgroup.controllers": "cpu io memory pids",
            **tree,
            **files,
        },
    )


# --- where groups are


def test_the_groups_of_this_process_are_found_in_mixed_trees(tmp_path: Path) -> None:
    trees = {tree.controllers: tree for tree in hierarchies(v1_host(tmp_path))}

    assert set(trees) == {("memory",), ("cpu", "cpuacct"), ()}
    assert trees[("memory",)].own == tmp_path / "sys/fs/cgroup/memory/app"
    assert trees[()].own == tmp_path / "sys/fs/cgroup/unified"


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    root = v1_host(
        tmp_path,
        own="/docker/abc",
        **{
            "proc/self/mountinfo": mount("/sys/fs/cgroup/memory", "cgroup", "memory", inside="/docker/abc"),
        },
    )

    (tree,) = hierarchies(root)

    assert tree.own == tree.mount == tmp_path / "sys/fs/cgroup/memory"


def test_a_group_is_made_below_the_own_one_so_that_outer_limits_keep_holding(tmp_path: Path) -> None:
    assert v1_parent("memory", v1_host(tmp_path)) == tmp_path / "sys/fs/cgroup/memory/app"


def test_in_version_2_a_group_is_made_where_the_controller_is_handed_on(tmp_path: Path) -> None:
    root = v2_host(tmp_path)

    assert v2_parent("memory", root) == tmp_path / "sys/fs/cgroup/user.slice"
    assert v2_parent("io", root) is None
    assert v2_parent(None, root) == tmp_path / "sys/fs/cgroup/user.slice/app"


def test_a_host_without_groups_offers_what_needs_none(tmp_path: Path) -> None:
    reasons = offered(budget(), tmp_path)

    assert "not mounted" in reasons["cgroup_v2"] and "not mounted" in reasons["cgroup_v1"]
    assert reasons["watchdog"] == reasons["none"] == ""


def test_the_best_mechanism_is_taken_and_the_reasons_against_better_ones_are_noted(tmp_path: Path) -> None:
    chosen = choose_enforcement("auto", budget(), v1_host(tmp_path))

    assert chosen.kind == "cgroup_v1"
    assert isinstance(chosen, CgroupV1)
    assert chosen.notes == ["not cgroup_v2: the memory controller is not in the unified tree"]
    assert choose_enforcement("auto", budget(), v2_host(tmp_path / "other")).kind == "cgroup_v2"


def test_a_wish_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="cgroup_v2 cannot be used: the memory controller is not in"):
        choose_enforcement("cgroup_v2", budget(), v1_host(tmp_path))
    with pytest.raises(SimulationError, match="must be one of auto"):
        choose_enforcement("rlimit_as", budget())  # type: ignore[arg-type]


def test_a_group_that_cannot_be_written_is_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = v1_host(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert "cannot make groups below" in offered(budget(), root)["cgroup_v1"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_process_that_is_limited_itself_cannot_simulate_more(tmp_path: Path, version: int) -> None:
    stat = {"sys/fs/cgroup/memory/app/memory.stat": f"hierarchical_memory_limit {100 * MIB}"}
    outer = {"sys/fs/cgroup/user.slice/memory.max": 100 * MIB}
    root = v1_host(tmp_path, **stat) if version == 1 else v2_host(tmp_path, **outer)

    name = f"cgroup_v{version}"
    assert "this process itself may have 100 MiB, less than the 256 MiB" in offered(budget(256), root)[name]
    assert offered(budget(64), root)[name] == ""


# --- what is written, and removed


class FakeTree:
    """Makes a folder behave like the system's: a new group has files, and goes with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, object]) -> None:
        self.made: list[Path] = []
        make, remove = Path.mkdir, Path.rmdir

        def mkdir(path: Path, *args: object, **options: object) -> None:
            make(path, *args, **options)  # type: ignore[arg-type]
            if path.name.startswith(PREFIX):
                self.made.append(path)
                for name, value in {"cgroup.procs": "", **files}.items():
                    (path / name).write_text(f"{value}\n")

        def rmdir(path: Path) -> None:
            for file in path.iterdir():
                file.unlink()
            remove(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)


V1_FILES = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.memsw.limit_in_bytes": "9223372036854771712",
    "memory.oom_control": "oom_kill 0",
}
V2_FILES = {"memory.max": "max", "memory.swap.max": "max", "memory.oom.group": "0", "cpu.max": "max 100000"}


def test_version_1_limits_memory_and_memory_with_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(monkeypatch, V1_FILES)
    enforcement = CgroupV1(budget(100, swap_mib=50, kill_delay_s=30), root=v1_host(tmp_path))

    with enforcement:
        memory, watched = tree.made
        assert (memory / "memory.limit_in_bytes").read_text().strip() == str(100 * MIB)
        assert (memory / "memory.memsw.limit_in_bytes").read_text().strip() == str(100 * MIB)
        assert enforcement.entry.groups == (memory, watched)
        held = enforcement.describe()

    assert (held.limit_bytes, held.swap_bytes, held.counts_files) == (100 * MIB, 0, True)
    assert any("stricter than the device's by 50 MiB of swap" in note for note in held.notes)
    assert any("up to 30 s" in note for note in held.notes)
    assert not memory.exists() and not watched.exists()
    assert not list(journals.journal_folder().glob("*"))


@pytest.mark.parametrize("counted", [True, False])
def test_swap_of_the_host_is_kept_away_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool
) -> None:
    tree = FakeTree(
        monkeypatch, {name: value for name, value in V1_FILES.items() if counted or "memsw" not in name}
    )
    root = v1_host(tmp_path, **{"proc/swaps": "Filename Type\n/dev/sda2 partition 1 0 -2"})

    with CgroupV1(budget(100), root=root) as enforcement:
        assert (tree.made[0] / "memory.swappiness").read_text() == "0\n"
        assert (tree.made[0] / "memory.memsw.limit_in_bytes").exists() == counted

    (note,) = enforcement.notes
    assert ("count as if they were in memory" in note) == counted
    assert ("laxer" in note) != counted


def test_version_2_limits_memory_and_forbids_swap_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(monkeypatch, V2_FILES)
    enforcement = CgroupV2(budget(100), root=v2_host(tmp_path))

    with enforcement:
        (group,) = tree.made
        values = {name: (group / name).read_text().strip() for name in V2_FILES}
        assert enforcement.entry.groups == (group,) and enforcement.entry.scope is None

    assert values["memory.max"] == str(100 * MIB)
    assert (values["memory.swap.max"], values["memory.oom.group"]) == ("0", "1")
    assert enforcement.describe().limit_bytes == 100 * MIB
    assert not group.exists()


def test_a_system_that_does_not_take_the_limit_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(monkeypatch, V2_FILES)
    write_text = Path.write_text
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda path, text, *rest, **named: (
            0 if path.name == "memory.max" and text != "max\n" else write_text(path, text, *rest, **named)
        ),
    )

    with pytest.raises(SimulationError, match="does not take the limit"):
        CgroupV2(budget(100), root=v2_host(tmp_path)).__enter__()

    assert not tree.made[0].exists()


def test_without_a_delegated_group_a_scope_of_the_users_systemd_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = v2_host(tmp_path, handed="nobody", **{"run/user/7/systemd/private": ""})
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("autoglm_edge.android_sim.limits.cgroup_v2.try_scope", lambda: "")

    with CgroupV2(budget(100), root=root) as enforcement:
        entry = enforcement.entry
        scope = root / "scope"
        counters = enforcement.entered(1, scope)

    assert entry.groups == ()
    assert entry.wrapper[:3] == ("systemd-run", "--user", "--scope")
    assert dict(entry.scope or ()) == {
        "memory.max": str(100 * MIB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
    }
    assert counters.folder == scope
    counters.close()


def test_without_systemd_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)

    assert "there is no systemd-run" in offered(budget(), v2_host(tmp_path, handed="nobody"))["cgroup_v2"]


@pytest.mark.parametrize(
    ("files", "refusal", "word"),
    [
        ({}, "", "no systemd of this user runs"),
        ({"run/user/7/bus": ""}, "systemd-run refuses (no bus)", "refuses"),
        (
            {
                "run/user/7/bus": "",
                f"sys/fs/cgroup/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service/"
                "cgroup.controllers": "cpu pids",
            },
            "",
            "not delegated",
        ),
    ],
)
def test_a_scope_that_cannot_be_had_is_no_mechanism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object], refusal: str, word: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("autoglm_edge.android_sim.limits.cgroup_v2.try_scope", lambda: refusal)

    assert word in offered(budget(), v2_host(tmp_path, handed="nobody", **files))["cgroup_v2"]


ENTER = """
import os, runpy, sys, time
from pathlib import Path
own, keep = Path(sys.argv[1]), int(sys.argv[2])
(own / "cgroup.procs").write_text(str(os.getpid()))
launch = runpy.run_path(sys.argv[3])
print(launch["enter_scope"](own, {"cgroup.max.depth": "0"}, keep, ""), os.getpid(), flush=True)
sys.stdin.read()
"""


def test_a_scope_lives_until_its_counters_were_read(tmp_path: Path) -> None:
    parent = v2_parent(None)
    if parent is None:
        pytest.skip("no unified group can be made here")
    scope = Group.make(parent, Journal(tmp_path / "j"))
    keep_in, keep_out = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", ENTER, str(scope.path), str(keep_in), launch.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(keep_in,),
    )
    os.close(keep_in)
    assert child.stdout is not None
    folder, pid = child.stdout.readline().split()
    inner = scope.path / launch.JOINED

    assert folder == str(inner) and members(inner) == [int(pid)]
    assert members(scope.path) == []
    assert (inner / "cgroup.max.depth").read_text() == "0\n"
    child.communicate()
    assert members(inner) == [] and len(members(scope.path / launch.KEPT)) == 1
    os.close(keep_out)
    until = time.monotonic() + 20
    while members(scope.path / launch.KEPT) and time.monotonic() < until:
        time.sleep(0.01)
    assert members(scope.path / launch.KEPT) == []
    scope.remove()
    assert not scope.path.exists()


def test_a_signal_while_things_are_removed_waits_until_they_are(tmp_path: Path) -> None:
    removed: list[str] = []

    class Thing:
        def __init__(self, name: str, *, first: bool = False) -> None:
            self.name, self.first = name, first

        def remove(self) -> None:
            if self.first:
                self.first = False
                raise KeyboardInterrupt
            removed.append(self.name)

    enforcement = Nothing(budget(100), root=tmp_path)
    with pytest.raises(KeyboardInterrupt), enforcement:
        for thing in (Thing("a"), Thing("b", first=True), Thing("c")):
            enforcement.keep(thing)

    assert removed == ["c", "b", "a"]


def test_a_resource_limit_says_what_it_cannot_do(tmp_path: Path) -> None:
    with DataLimit(budget(100, swap_mib=50), root=tmp_path) as enforcement:
        held = enforcement.describe()

    assert enforcement.entry.data_limit_bytes == held.limit_bytes == 100 * MIB
    assert not held.counts_files
    assert any("mapped files are not limited" in note for note in held.notes)
    assert any("50 MiB" in note for note in held.notes)


def test_a_watchdog_sees_what_cannot_be_dropped(tmp_path: Path) -> None:
    enforcement = Watchdog(budget(100), root=tmp_path)

    assert not enforcement.is_exceeded(Sample(0, 60 * MIB, 20 * MIB, 20 * MIB, 900 * MIB))
    assert enforcement.is_exceeded(Sample(0, 60 * MIB, 20 * MIB, 21 * MIB, 0))
    assert not Nothing(budget(100), root=tmp_path).is_exceeded(Sample(0, 900 * MIB, 0, 0, 0))
    assert Nothing(budget(100), root=tmp_path).describe().limit_bytes is None


# --- what a crash leaves


def test_a_journal_is_there_as_long_as_something_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.add("group", path="/a")
    journal.add("zram", number=3)
    (file,) = (tmp_path / "j").glob("*.json")
    journal.strike("group", path="/a")

    assert json.loads(file.read_text())["made"] == [{"kind": "zram", "number": 3}]
    journal.strike("zram", number=3)
    assert not file.exists()


def test_what_a_dead_run_made_is_undone_in_reverse_and_a_live_one_is_left_alone(tmp_path: Path) -> None:
    made = [{"kind": "a", "x": 1}, {"kind": "b"}, {"kind": "unknown"}]
    dead = {"boot": journals.boot_id(), "made": made}
    write(tmp_path, {f"{GONE}.json": json.dumps(dead)})
    own = Journal(tmp_path)
    own.add("a", x=2)
    undone: list[str] = []

    names = undo_leftovers(
        {"a": lambda entry: undone.append(f"a{entry['x']}"), "b": lambda entry: undone.append("b")}, tmp_path
    )

    assert names == [GONE]
    assert undone == ["b", "a1"]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_what_cannot_be_undone_stays_in_the_journal(tmp_path: Path) -> None:
    def refuse(entry: object) -> None:
        raise SimulationError("busy")

    write(tmp_path, {f"{GONE}.json": json.dumps({"boot": journals.boot_id(), "made": [{"kind": "a"}]})})

    assert undo_leftovers({"a": refuse}, tmp_path) == []
    assert (tmp_path / f"{GONE}.json").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"made": 3, "boot": "x"}', '{"boot": "elsewhere", "made": []}']
)
def test_a_damaged_journal_or_one_of_another_machine_is_left_until_it_is_old(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / f"{GONE}.json"
    path.write_text(text)

    undo_leftovers({"a": lambda entry: pytest.fail("undone")}, tmp_path)
    assert path.exists()

    os.utime(path, (time.time() - 30 * 86400,) * 2)
    undo_leftovers({}, tmp_path)
    assert not path.exists()


def test_a_process_of_another_view_counts_as_alive() -> None:
    assert is_alive(f"{owner_name(os.getpid())}-0")
    assert not is_alive(GONE)
    assert is_alive("1-999999999-1-0")
    assert is_alive("nonsense")


def test_groups_of_dead_runs_are_removed_without_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = v1_host(tmp_path)
    FakeTree(monkeypatch, {})
    stale = tmp_path / f"sys/fs/cgroup/memory/app/{PREFIX}{GONE}"
    foreign = tmp_path / f"sys/fs/cgroup/memory/app/{PREFIX}{owner_name(os.getpid())}-7"
    stale.mkdir()
    foreign.mkdir()
    # Processes are this machine's, the tree is the fake one's.
    monkeypatch.setattr("autoglm_edge.android_sim.limits.groups.is_alive", lambda name, root: is_alive(name))

    assert clean_up(root) == [stale.name]
    assert not stale.exists() and foreign.exists()


def test_a_group_that_is_none_of_ours_is_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "system.slice"
    folder.mkdir()

    with pytest.raises(SimulationError, match="left alone"):
        remove_group(folder)
    assert folder.exists()


def test_a_full_disk_stops_a_run_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(monkeypatch, V1_FILES)

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    enforcement = CgroupV1(budget(100), root=v1_host(tmp_path))
    monkeypatch.setattr("autoglm_edge.android_sim.limits.journal.replace_file", full)

    with pytest.raises(SimulationError, match="No space left on device"):
        enforcement.__enter__()
    assert tree.made == []


def test_a_group_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")

    with pytest.raises(SimulationError, match="cannot be made"):
        Group.make(tmp_path / "missing", journal)
    assert not list((tmp_path / "j").glob("*"))


# --- swap, read-ahead, page cache, quotas


def zram_host(root: Path) -> Path:
    return write(
        root,
        {
            "sys/class/zram-control/hot_add": "3",
            "sys/class/zram-control/hot_remove": "",
            "sys/block/zram3/comp_algorithm": "[lzo-rle] lzo lz4",
            "sys/block/zram3/disksize": "0",
            "sys/block/zram3/reset": "",
            "dev/zram3": "x" * 8192,
        },
    )


def test_compressed_swap_is_set_up_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "autoglm_edge.android_sim.limits.zram._swap", lambda name, path, *flags: calls.append(name)
    )
    root = zram_host(tmp_path)

    device = Zram.make(64 * MIB + 5, Journal(tmp_path / "j"), root)
    assert device.size_bytes == 64 * MIB
    assert (device.folder / "comp_algorithm").read_text() == device.algorithm == "lz4"
    device.remove()

    assert calls == ["swapon", "swapoff"]
    assert (root / "sys/class/zram-control/hot_remove").read_text() == "3"
    assert not list((tmp_path / "j").glob("*"))


def test_swap_that_is_refused_leaves_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, path: Path, *flags: int) -> None:
        raise OSError(22 if name == "swapoff" else 1, "Operation not permitted")

    monkeypatch.setattr("autoglm_edge.android_sim.limits.zram._swap", refuse)
    root = zram_host(tmp_path)

    with pytest.raises(SimulationError, match="cannot be set up"):
        Zram.make(64 * MIB, Journal(tmp_path / "j"), root)
    assert (root / "sys/class/zram-control/hot_remove").read_text() == "3"


def test_a_kernel_without_zram_has_no_swap(tmp_path: Path) -> None:
    assert "no zram" in why_not(tmp_path)
    with pytest.raises(SimulationError, match="no zram"):
        Zram.make(MIB, Journal(tmp_path), tmp_path)


def test_a_device_that_somebody_else_took_meanwhile_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "autoglm_edge.android_sim.limits.zram._swap", lambda name, path, *flags: calls.append(name)
    )
    root = write(zram_host(tmp_path), {"sys/block/zram3/disksize": 1024})

    undo_zram({"number": 3}, root)
    undo_zram({"number": "3"}, root)
    undo_zram({"number": 9}, root)
    assert calls == []

    (root / "dev/zram3").write_bytes(swap_header(64 * MIB))
    undo_zram({"number": 3}, root)
    assert calls == ["swapoff"]


def test_a_swap_header_has_the_pages_that_fit() -> None:
    page = swap_header(64 * MIB)

    assert len(page) == PAGE_BYTES and page.endswith(b"SWAPSPACE2")
    assert int.from_bytes(page[1028:1032], "little") == 64 * MIB // PAGE_BYTES - 1


def disk_host(root: Path, file: Path, kib: int = 8192) -> tuple[Path, Path]:
    device = file.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    write(root, {f"sys/class/bdi/{name}/read_ahead_kb": kib, f"sys/dev/block/{name}/dev": name})
    return root, root / f"sys/class/bdi/{name}/read_ahead_kb"


def test_read_ahead_is_set_and_put_back(tmp_path: Path) -> None:
    root, setting = disk_host(tmp_path, tmp_path)
    ahead = ReadAhead(tmp_path, Journal(tmp_path / "j"), root)

    assert ahead.set(128 << 10) == ""
    assert setting.read_text() == "128"
    other = ReadAhead(tmp_path, Journal(tmp_path / "k"), root)
    assert "another run" in other.set(256 << 10)
    other.restore()
    ahead.restore()
    ahead.restore()

    assert setting.read_text() == "8192"
    assert not list((tmp_path / "j").glob("*"))


def test_read_ahead_that_cannot_be_set_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = disk_host(tmp_path, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    note = ReadAhead(tmp_path, Journal(tmp_path / "j"), root).set(128 << 10)

    assert "8192 KiB ahead, the device 128 KiB" in note
    assert "not known" in ReadAhead(tmp_path, Journal(tmp_path / "j"), tmp_path / "no").set(1 << 20)


def test_a_journal_cannot_make_us_write_elsewhere(tmp_path: Path) -> None:
    root, setting = disk_host(tmp_path, tmp_path)
    victim = tmp_path / "read_ahead_kb"
    victim.write_text("precious")

    undo_readahead({"path": str(victim), "kib": 1}, root)
    undo_readahead({"path": str(setting), "kib": "1"}, root)
    undo_readahead({"path": str(setting), "kib": -1}, root)
    assert (victim.read_text(), setting.read_text()) == ("precious", "8192\n")

    undo_readahead({"path": str(setting), "kib": 512}, root)
    assert setting.read_text() == "512"


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "model/weights"
    file.write_bytes(os.urandom(8 * MIB))
    descriptor = os.open(file, os.O_RDONLY)
    warm = cached_bytes(descriptor, 8 * MIB)
    os.close(descriptor)
    if not warm:
        pytest.skip("this system or file system tells nothing of its page cache")

    dropped = drop_files([tmp_path / "model"])

    assert (dropped.files, dropped.total_bytes) == (1, 8 * MIB)
    assert dropped.before_bytes == 8 * MIB
    if os.statvfs(tmp_path).f_fsid and dropped.after_bytes == dropped.before_bytes:
        pytest.skip("temporary files lie in memory here")
    assert dropped.after_bytes == 0 and dropped.note == ""


def test_what_stays_in_the_page_cache_is_said(tmp_path: Path) -> None:
    assert "3 MiB of the model stay" in Dropped(1, 8 * MIB, 8 * MIB, 3 * MIB).note
    assert "not known" in Dropped(1, 8 * MIB, None, None).note
    with pytest.raises(SimulationError, match="cannot be read"):
        drop_files([tmp_path / "missing"])


def test_a_quota_follows_the_thermal_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTree(monkeypatch, {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1"})
    monkeypatch.setattr("autoglm_edge.android_sim.limits.throttle.usable_cores", lambda: 2)
    hot = budget(thermal_burst_s=10.0, thermal_sustained=0.5, threads=2)
    throttle = Throttle(hot, v1_host(tmp_path))

    throttle.open_cpu(Journal(tmp_path / "j"), None)
    (group,) = throttle.groups
    quotas = []
    for moment in (0.0, 10.0, 20.0, 1000.0):
        throttle.at(moment)
        quotas.append(int((group / "cpu.cfs_quota_us").read_text()))
    throttle.close()

    assert quotas[0] == quotas[1] == 40_000
    assert 20_000 < quotas[2] < 40_000
    assert quotas[3] == 20_000
    assert not group.exists()


def test_in_version_2_the_memory_group_has_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeTree(monkeypatch, V2_FILES)
    root = v2_host(tmp_path)
    throttle = Throttle(budget(threads=1), root)

    with CgroupV2(budget(100), root=root) as enforcement:
        throttle.open_cpu(enforcement.journal, enforcement.group)
        group = enforcement.group
        assert group is not None and group.read("cpu.max") == "20000 20000"
        throttle.close()


def test_a_host_without_quotas_says_so(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="processor time cannot be limited"):
        Throttle(budget(), tmp_path).open_cpu(Journal(tmp_path / "j"), None)
    with pytest.raises(SimulationError, match="cannot be limited here"):
        Throttle(budget(), tmp_path).open_storage(tmp_path, Journal(tmp_path / "j"), None)


def test_storage_is_limited_on_the_whole_disk(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    write(tmp_path, {"sys/devices/vda/dev": "8:0", "sys/devices/vda/vda1/dev": name, "sys/dev/block/x": ""})
    write(tmp_path, {"sys/devices/vda/vda1/partition": 1})
    (tmp_path / f"sys/dev/block/{name}").symlink_to(tmp_path / "sys/devices/vda/vda1")

    assert whole_disk(tmp_path, tmp_path) == "8:0"
    assert whole_disk(tmp_path, tmp_path / "no") == ""


# --- counters


def test_counters_of_version_2_are_read_anew_each_time(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "memory.stat": "anon 100\nfile 7\nshmem 20\nworkingset_refault_file 3",
            "memory.current": 500,
            "memory.swap.current": 40,
            "memory.peak": 900,
            "memory.pressure": "some avg10=0.00 total=1500000\nfull avg10=0.00 total=500000",
            "cpu.stat": "usage_usec 2500000\nuser_usec 1",
            "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 1",
        },
    )
    counters = GroupCounters(tmp_path, pressure=tmp_path)

    memory = counters.memory()
    assert memory is not None
    assert (memory.anon_bytes, memory.shmem_bytes, memory.swap_bytes) == (100, 20, 40)
    assert memory.refaulted_bytes == 3 * PAGE_BYTES
    assert counters.stalls_s() == (1.5, 0.5)
    assert (counters.cpu_s(), counters.charged_bytes(), counters.peak_bytes()) == (2.5, 500, 900)
    assert (counters.oom_kills(), counters.hit_limit()) == (0, False)

    write(tmp_path, {"memory.stat": "anon 200\nshmem 0", "memory.events": "max 5\noom 1\noom_kill 2"})
    again = counters.memory()
    assert again is not None and (again.anon_bytes, again.refaulted_bytes) == (200, None)
    assert (counters.oom_kills(), counters.hit_limit()) == (1, True)
    counters.close()


def test_counters_of_version_1_count_groups_below(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "memory.stat": "rss 1\ntotal_rss 100\ntotal_rss_huge 50\ntotal_shmem 20\ntotal_swap 40\n"
            "total_workingset_refault_file 3",
            "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0",
            "memory.usage_in_bytes": 500,
            "memory.failcnt": 0,
            "memory.max_usage_in_bytes": 63 * MIB,
            "memory.limit_in_bytes": 100 * MIB,
        },
    )
    counters = GroupCounters(tmp_path, legacy=True)

    memory = counters.memory()
    assert memory is not None
    assert (memory.anon_bytes, memory.shmem_bytes, memory.swap_bytes) == (100, 20, 40)
    assert not counters.hit_limit()
    write(tmp_path, {"memory.max_usage_in_bytes": 99 * MIB, "memory.oom_control": "oom_kill 2"})
    assert counters.hit_limit() and counters.oom_kills() == 2
    counters.close()


def test_a_group_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    counters = GroupCounters(None)

    assert counters.memory() is None and counters.charged_bytes() is None and counters.cpu_s() is None
    assert counters.stalls_s() == (None, None)
    assert counters.oom_kills() == 0 and not counters.hit_limit() and counters.peak_bytes() is None
    counters.close()
