"""How a child gets into its limits: what `launch.py` does before it becomes the command.

In: groups to join and limits to take. Out: the command line to start instead of the command. Starts nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import launch
from .mounts import hierarchies


@dataclass(frozen=True)
class Entry:
    """The way in.

    Attributes:
        groups: folders of groups that the child joins.
        data_limit_bytes: RLIMIT_DATA that it takes; None for none.
        scope: files and values of a group that it makes for itself in the scope it is started in; None for
        none. wrapper: command in front, which starts the scope. sealed: the child gives up the means to lift
        its limits.
    """

    groups: tuple[Path, ...] = ()
    data_limit_bytes: int | None = None
    scope: tuple[tuple[str, str], ...] | None = None
    wrapper: tuple[str, ...] = ()
    sealed: bool = True

    def joined_by(self, groups: Sequence[Path]) -> Entry:
        """The same with more groups to join."""
        return replace(self, groups=self.groups + tuple(groups))

    def command(self, command: Sequence[str], *, report: int, keep: int, root: Path = Path("/")) -> list[str]:
        """What to start.

        Args:
            command: that the child becomes.
            report: descriptor of the pipe that it reports on.
            keep: descriptor of a pipe whose end says that its scope is no longer needed.
            root: where /proc lies.
        """
        spec = {
            "groups": [str(folder) for folder in self.groups],
            "data_limit_bytes": self.data_limit_bytes,
            "scope": None if self.scope is None else dict(self.scope),
            "mounts": _mounts(root),
            "sealed": self.sealed,
            "parent": os.getpid(),
            "report": report,
            "keep": keep,
            "command": list(command),
        }
        return [*self.wrapper, sys.executable, "-I", "-S", launch.__file__, json.dumps(spec)]


def _mounts(root: Path) -> list[list[str]]:
    """Trees of groups that the child must not write to, with their mount options."""
    options = {}
    try:
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            if len(words) > 5:
                options[words[4]] = words[5]
    except OSError:
        return []
    paths = [str(Path("/") / tree.mount.relative_to(root)) for tree in hierarchies(root)]
    return [[path, options.get(path, "")] for path in paths]
