"""What a run inside the limits left behind: samples of its memory, its phases, how it ended, what held it.

In: nothing. Out: frozen records, passed from the runner to whoever judges them. Knows no device, reads no
file and starts no process. Times are seconds since the start of the child, on one monotonic clock; sizes are
bytes.

    Trace
    ├── samples     Sample, 20 to 50 a second
    ├── phases      Phase, in order: start, load, image, prefill, decode, score, done
    ├── result      ChildResult (child_result.py); None if the child never got there
    └── enforced    Enforced: what held the child, and what that cannot do
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from autoglm_edge.errors import SimulationError

from .child_result import ChildResult

EnforcementKind = Literal["cgroup_v2", "cgroup_v1", "rlimit_data", "watchdog", "none"]
Ending = Literal["exited", "killed", "timeout", "interrupted"]
KilledBy = Literal["limit", "watchdog", "outside"]
PHASES = ("start", "load", "image", "prefill", "decode", "score", "done")
"""Names that the runtime's own child reports; other commands may report others, or none."""


@dataclass(frozen=True)
class Sample:
    """One look at the child. Counters are since the start of the run; None is not told by this host.

    Attributes:
        at_s: moment.
        anon_bytes: resident and anonymous, of the child and its own children.
        shmem_bytes: resident and shared.
        swap_bytes: anonymous and swapped out.
        file_bytes: resident and mapped from files (RssFile); the system may drop these at any time.
        charged_bytes: what the control group counts, cached file pages included.
        refaulted_bytes: file pages read again after they had been dropped for want of memory.
        read_bytes: fetched from storage.
        psi_some_s: time in which some task waited for memory.
        psi_full_s: time in which all of them did.
        cpu_s: processor time, user and system.
    """

    at_s: float
    anon_bytes: int
    shmem_bytes: int
    swap_bytes: int
    file_bytes: int
    charged_bytes: int | None = None
    refaulted_bytes: int | None = None
    read_bytes: int | None = None
    psi_some_s: float | None = None
    psi_full_s: float | None = None
    cpu_s: float = 0.0

    @property
    def held_bytes(self) -> int:
        """Anonymous + shared + swapped: what cannot be dropped, and what Android counts before it kills."""
        return self.anon_bytes + self.shmem_bytes + self.swap_bytes


@dataclass(frozen=True)
class Phase:
    """A stretch of the run.

    Attributes:
        name: one of PHASES from the runtime's own child.
        start_s: its beginning.
        stop_s: its end; None if the child ended in it.
    """

    name: str
    start_s: float
    stop_s: float | None

    def __post_init__(self) -> None:
        if not self.name:
            raise SimulationError("a phase has no name; give it one")
        if self.stop_s is not None and self.stop_s < self.start_s:
            raise SimulationError(
                f"phase {self.name!r} ends at {self.stop_s} s, before it begins at {self.start_s} s"
            )

    def contains(self, at_s: float) -> bool:
        """Whether a moment lies in it; its end belongs to the next one."""
        return self.start_s <= at_s and (self.stop_s is None or at_s < self.stop_s)


@dataclass(frozen=True)
class Enforced:
    """What held the child.

    Attributes:
        kind: the mechanism. "none" only watches.
        limit_bytes: as the system took it, rounded to pages; None without one.
        swap_bytes: compressed memory that was really there.
        counts_files: whether resident pages of mapped files count against the limit, as on a phone.
        notes: what differs from a phone here, a sentence each.
    """

    kind: EnforcementKind
    limit_bytes: int | None
    swap_bytes: int = 0
    counts_files: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(EnforcementKind):
            raise SimulationError(
                f"the enforcement is {self.kind!r}, must be one of {', '.join(get_args(EnforcementKind))}"
            )


@dataclass(frozen=True)
class Peak:
    """The most that was seen of something.

    Attributes:
        bytes: how much.
        at_s: when.
        phase: in which phase; "" before the first.
    """

    bytes: int
    at_s: float
    phase: str


@dataclass(frozen=True)
class Trace:
    """A run, from the start of the child to its end.

    Attributes:
        samples: in order.
        phases: in order, without gaps.
        ending: "killed" is by a signal; "timeout" by the runner, after the wall limit; "interrupted" by the
            caller's event.
        exit_code: None if a signal ended it.
        signal: that ended it, else None.
        oom_kills: of the control group's own counter; 0 where there is none.
        message: the child's own error sentence, or the last lines of its stderr; "" if it ended well.
        result: what the child said; None if it never got there.
        enforced: what held it.
        interval_s: between samples, as asked for.
        sampling_share: what sampling cost, of one core.
        seconds: from the start of the child to its end.
        killed_by: "limit" if the kernel killed it for the group's limit, "watchdog" if the runner did,
            "outside" if somebody else did; None if it was not killed.
        alloc_failed: the child failed because it was refused memory.
        peak_charged_bytes: of the control group's own high-water mark, which no sample misses; None without.
    """

    samples: tuple[Sample, ...]
    phases: tuple[Phase, ...]
    ending: Ending
    exit_code: int | None
    signal: int | None
    oom_kills: int
    message: str
    result: ChildResult | None
    enforced: Enforced
    interval_s: float
    sampling_share: float
    seconds: float = 0.0
    killed_by: KilledBy | None = None
    alloc_failed: bool = False
    peak_charged_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.ending not in get_args(Ending):
            raise SimulationError(
                f"the ending is {self.ending!r}, must be one of {', '.join(get_args(Ending))}"
            )
        if self.exit_code is not None and self.signal is not None:
            raise SimulationError(
                f"a child ended with status {self.exit_code} and by signal {self.signal}; it can be only one"
            )
        moments = [sample.at_s for sample in self.samples]
        if moments != sorted(moments):
            raise SimulationError("samples are not in the order of time")

    @property
    def completed(self) -> bool:
        """Whether the child did all that it was asked to."""
        return self.ending == "exited" and self.exit_code == 0

    def phase_at(self, at_s: float) -> str:
        """Name of the phase of a moment; "" before the first."""
        return next((phase.name for phase in reversed(self.phases) if phase.start_s <= at_s), "")

    @property
    def last_phase(self) -> str:
        """Name of the phase in which the child ended; "" if it reported none."""
        return self.phases[-1].name if self.phases else ""

    def during(self, *names: str) -> tuple[Sample, ...]:
        """Samples of some phases; of all phases if none is named."""
        if not names:
            return self.samples
        return tuple(sample for sample in self.samples if self.phase_at(sample.at_s) in names)

    def peak_held(self, *names: str) -> Peak:
        """Most of anonymous + shared + swapped, in some phases or in all; 0 bytes without samples."""
        return self._peak(self.during(*names), "held_bytes")

    def peak_anon(self, *names: str) -> Peak:
        """Most of resident anonymous memory."""
        return self._peak(self.during(*names), "anon_bytes")

    def peak_swap(self, *names: str) -> Peak:
        """Most of swapped memory."""
        return self._peak(self.during(*names), "swap_bytes")

    def peak_file(self, *names: str) -> Peak:
        """Most of resident pages mapped from files: the working set, as far as the limit let it stay."""
        return self._peak(self.during(*names), "file_bytes")

    def first_above(self, limit_bytes: int) -> float | None:
        """Moment at which anonymous + shared + swapped were first seen above a limit; None if never."""
        return next((sample.at_s for sample in self.samples if sample.held_bytes > limit_bytes), None)

    def change(self, name: str, *phases: str) -> float | None:
        """How much a counter of Sample rose during some phases, or in all; None if the host does not tell.

        Args:
            name: "refaulted_bytes", "read_bytes", "psi_some_s", "psi_full_s" or "cpu_s".
            phases: names; each counts from the last sample before it to its own last one.

        Raises:
            SimulationError: that is no counter.
        """
        if name not in ("refaulted_bytes", "read_bytes", "psi_some_s", "psi_full_s", "cpu_s"):
            raise SimulationError(f"{name!r} is no counter of a sample")
        wanted = set(phases)
        rise, before, told = 0.0, 0.0, False
        for sample in self.samples:
            value = getattr(sample, name)
            if value is None:
                continue
            if not wanted or self.phase_at(sample.at_s) in wanted:
                rise, told = rise + max(0.0, value - before), True
            before = value
        return rise if told else None

    def phase_seconds(self, name: str) -> float:
        """How long a phase took in all, up to the end of the run if it was never left."""
        return sum(
            (self.seconds if phase.stop_s is None else phase.stop_s) - phase.start_s
            for phase in self.phases
            if phase.name == name
        )

    def to_json(self) -> dict[str, Any]:
        """As a JSON object: names as here, samples as columns."""
        document = asdict(self)
        document["samples"] = {
            field.name: [getattr(sample, field.name) for sample in self.samples] for field in fields(Sample)
        }
        return document

    def _peak(self, samples: Sequence[Sample], name: str) -> Peak:
        if not samples:
            return Peak(0, 0.0, "")
        sample = max(samples, key=lambda item: int(getattr(item, name)))
        return Peak(int(getattr(sample, name)), sample.at_s, self.phase_at(sample.at_s))
