"""Where this process stands in the control groups of the system, and where it may make groups of its own.

In: /proc/self/cgroup and /proc/self/mountinfo. Out: folders below /sys/fs/cgroup. Makes nothing. A root other
than "/" is for tests, which write such trees as plain files.

A group is made below the one that this process is in, or below the nearest one above it that allows it: so
whatever limits this process already has keep holding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEPARATOR = " - "


@dataclass(frozen=True)
class Hierarchy:
    """One mounted tree of groups.

    Attributes:
        mount: its folder.
        controllers: of version 1, as mounted; empty for version 2, whose groups say what they control.
        own: folder of the group that this process is in.
    """

    mount: Path
    controllers: tuple[str, ...]
    own: Path

    @property
    def is_v2(self) -> bool:
        """Whether it is the unified tree of version 2."""
        return not self.controllers

    def upwards(self) -> Iterator[Path]:
        """The group of this process, and those above it."""
        folder = self.own
        while folder != self.mount and folder.is_relative_to(self.mount):
            yield folder
            folder = folder.parent
        yield self.mount


def hierarchies(root: Path = Path("/")) -> list[Hierarchy]:
    """The trees that are mounted and that this process is in; empty where there are no control groups."""
    groups = _own_groups(root)
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        head, _, tail = line.partition(SEPARATOR)
        words, kinds = head.split(), tail.split()
        if len(words) < 5 or len(kinds) < 3 or kinds[0] not in ("cgroup", "cgroup2"):
            continue
        inside, mount = _unescaped(words[3]), root / _unescaped(words[4]).lstrip("/")
        if kinds[0] == "cgroup2":
            controllers: tuple[str, ...] = ()
        else:
            offered = set(kinds[2].split(","))
            controllers = next((names for names in groups if names and set(names) <= offered), ())
            if not controllers:
                continue
        if controllers not in groups:
            continue
        found.append(Hierarchy(mount, controllers, _below(mount, inside, groups[controllers])))
    return found


def v1_tree(controller: str, root: Path = Path("/")) -> Hierarchy | None:
    """The tree of a controller of version 1; None if it is not mounted."""
    return next((tree for tree in hierarchies(root) if controller in tree.controllers), None)


def v2_tree(root: Path = Path("/")) -> Hierarchy | None:
    """The unified tree; None if it is not mounted."""
    return next((tree for tree in hierarchies(root) if tree.is_v2), None)


def v1_parent(controller: str, root: Path = Path("/")) -> Path | None:
    """The nearest group of a controller of version 1 in which a group can be made; None without."""
    tree = v1_tree(controller, root)
    if tree is None:
        return None
    return next((folder for folder in tree.upwards() if _writable(folder)), None)


def v2_parent(controller: str | None, root: Path = Path("/")) -> Path | None:
    """The nearest unified group in which a group with a controller can be made and entered from here.

    Groups hand controllers on only if they hold no processes themselves, so it is rarely the own one. To
    enter a group, the common ancestor of the old and the new one must be writable: that is this parent.

    Args:
        controller: "memory", "cpu" or "io"; None takes a group without any, for its pressure files.
        root: where /sys and /proc lie.
    """
    tree = v2_tree(root)
    if tree is None:
        return None
    for folder in tree.upwards():
        handed = _words(folder / "cgroup.subtree_control")
        if (controller is None or controller in handed) and _writable(folder):
            return folder
    return None


def _writable(folder: Path) -> bool:
    """Whether a group can be made in a folder and processes be moved to it."""
    members = folder / "cgroup.procs"
    return os.access(folder, os.W_OK | os.X_OK) and members.exists() and os.access(members, os.W_OK)


def _own_groups(root: Path) -> dict[tuple[str, ...], str]:
    """Path of the own group by controllers; the unified tree has none."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        groups[tuple(name for name in names.split(",") if name)] = path
    return groups


def _below(mount: Path, inside: str, group: str) -> Path:
    """Folder of a group; in a container the tree's top may be mounted from further down."""
    relative = os.path.relpath(group, inside) if inside != "/" else group.lstrip("/")
    if relative.startswith(".."):
        return mount
    return mount / relative if relative not in ("", ".") else mount


def _unescaped(text: str) -> str:
    """Mountinfo writes blanks as octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
