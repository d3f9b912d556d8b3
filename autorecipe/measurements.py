"""Measurements: the divergence of one bundle, prompt by prompt, and a journal that keeps many of them.

In: sums of divergence. Out: means, differences with their errors, and the same after a restart. Knows nothing
of bundles and of how a divergence comes about.

The journal is one JSON file that is replaced as a whole after each measurement, so that a crash loses one
measurement at most. It belongs to one model, reference and set of formats, and is refused for another.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoglm_edge.errors import ParityError
from autoglm_edge.files import replace_file, try_lock

FORMAT = "autoglm-edge sensitivity"
VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """Divergence of one bundle from the reference over the answers, prompt by prompt.

    Attributes:
        counts: positions of each prompt's answer.
        sums: of KL(reference || bundle) over them, in nats.
        seconds: that it took.
    """

    counts: tuple[int, ...]
    sums: tuple[float, ...]
    seconds: float

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.sums) or not sum(self.counts):
            raise ParityError(
                f"a measurement has {len(self.counts)} prompts, {len(self.sums)} sums, no positions"
            )
        if not all(math.isfinite(value) for value in self.sums):
            raise ParityError("a divergence is not finite; the bundle computes inf or nan")

    @property
    def kl(self) -> float:
        """Mean over all positions."""
        return math.fsum(self.sums) / sum(self.counts)

    def added(self, base: Measurement) -> tuple[float, float]:
        """By how much the mean lies above that of another measurement at the same positions.

        Returns:
            The difference, which chance can bring below 0, and its standard error: of a ratio estimator, with
            prompts taken as independent and positions within one not (Cochran, Sampling Techniques, 1977,
            chapter 6); nan for a single prompt.
        """
        if self.counts != base.counts:
            raise ParityError("two measurements are of other positions; measure both anew")
        total, prompts = sum(self.counts), len(self.counts)
        differences = [ours - theirs for ours, theirs in zip(self.sums, base.sums, strict=True)]
        mean = math.fsum(differences) / total
        if prompts < 2:
            return mean, math.nan
        square = math.fsum((d - mean * n) ** 2 for d, n in zip(differences, self.counts, strict=True))
        return mean, math.sqrt(square * prompts / (prompts - 1)) / total


def mixture_key(levels: Mapping[str, str]) -> str:
    """A name for a choice of formats: equal for equal choices, whatever groups they were made in.

    Args:
        levels: name of the format, by tensor.
    """
    return hashlib.sha256(json.dumps(sorted(levels.items())).encode()).hexdigest()[:24]


@dataclass
class Journal:
    """Measurements in a file that is replaced as a whole after each. A context manager that holds a lock.

    Attributes:
        path: the file; `path`.lock beside it is locked while the journal is open.
        identity: what the measurements depend on; a file of another identity is refused.
    """

    path: Path
    identity: Mapping[str, Any]
    _measured: dict[str, Measurement] = field(default_factory=dict)
    _labels: dict[str, str] = field(default_factory=dict)
    _lock: int | None = None

    def __enter__(self) -> Journal:
        """Lock and read.

        Raises:
            ParityError: another process works here, the folder holds something else, the file is damaged, or
                its measurements are of another model, reference or choice of formats.
        """
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            locked = try_lock(self._lock)
        except OSError as error:
            self._free()
            raise ParityError(f"the workspace {self.path.parent} cannot be used: {error}") from error
        if not locked:
            self._free()
            raise ParityError(
                f"another process measures in {self.path.parent} (it holds {lock.name}); wait for it, or "
                "name another workspace"
            )
        try:
            self._read()
        except BaseException:
            self._free()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._free()

    def get(self, key: str) -> Measurement | None:
        """What was measured under a key, or None."""
        return self._measured.get(key)

    def add(self, key: str, label: str, measurement: Measurement) -> None:
        """Keep a measurement, on disk too.

        Args:
            key: of `mixture_key`.
            label: for people.
            measurement: to keep.

        Raises:
            ParityError: the file cannot be written.
        """
        self._measured[key] = measurement
        self._labels[key] = label
        self._write()

    def _read(self) -> None:
        folder = self.path.parent
        if not self.path.exists():
            strangers = sorted(
                path.name
                for path in folder.iterdir()
                if path.name not in (f"{self.path.name}.lock", f"{self.path.name}.new")
            )
            if strangers:
                raise ParityError(
                    f"the workspace {folder} holds {strangers[0]!r} and no {self.path.name}; name a folder "
                    "that is empty or does not exist"
                )
            self._write()
            return
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            known = document["format"] == FORMAT and document["version"] == VERSION
            identity = dict(document["identity"])
            entries = {str(key): dict(entry) for key, entry in document["measurements"].items()}
            for key, entry in entries.items() if known else ():
                counts, sums = ([*entry["positions"]], [*entry["kl_sums"]])
                if not all(type(count) is int and count >= 0 for count in counts):
                    raise ValueError(f"positions {counts}")
                self._measured[key] = Measurement(
                    tuple(counts), tuple(float(value) for value in sums), float(entry["seconds"])
                )
                self._labels[key] = str(entry["label"])
        except OSError as error:
            raise ParityError(f"{self.path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ParityError) as error:
            raise ParityError(
                f"{self.path} is damaged, or no journal of measurements ({error}); delete it or name another "
                "workspace"
            ) from error
        if not known:
            raise ParityError(f"{self.path} was written by another release; name another workspace")
        wanted = json.loads(json.dumps(dict(self.identity)))
        if identity != wanted:
            differs = next(name for name in (*wanted, *identity) if identity.get(name) != wanted.get(name))
            raise ParityError(
                f"{self.path} holds measurements of another kind ({differs}: {_short(identity.get(differs))} "
                f"there, {_short(wanted.get(differs))} now); name another workspace, or delete this one"
            )

    def _write(self) -> None:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "identity": dict(self.identity),
            "measurements": {
                key: {
                    "label": self._labels[key],
                    "positions": item.counts,
                    "kl_sums": item.sums,
                    "seconds": round(item.seconds, 3),
                }
                for key, item in self._measured.items()
            },
        }
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        try:
            replace_file(self.path, text.encode())
        except OSError as error:
            raise ParityError(f"{self.path} cannot be written: {error}") from error

    def _free(self) -> None:
        handle, self._lock = self._lock, None
        if handle is not None:
            os.close(handle)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
