"""Device profiles: what a phone or board has, each figure with its unit, basis and source.

In: the TOML files beside this module, or one of a user. Out: `Device`. What a profile leaves out is filled in
by the rules of android.toml for its kind, and such a figure says which rule it came from. Knows nothing of
bundles and runs.

A file of one's own needs an id, a kind, and the memory of an app, all else has defaults or can be left out:

    id = "my-phone"
    kind = "phone"                    # phone, edge or laptop
    [figures]
    ram_marketed = 8                  # a bare number is an estimate of whoever wrote the file
    dram_peak = { value = 51.2, unit = "GB/s", basis = "derived", source = "6400 MT/s on 64 bits" }
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from autoglm_edge.errors import SimulationError

Basis = Literal["published", "derived", "measured", "estimate"]
Kind = Literal["phone", "edge", "laptop"]

UNITS: dict[str, str] = {
    "ram_marketed": "GiB",
    "mem_total": "MiB",
    "mem_available_boot": "MiB",
    "mem_visible": "MiB",
    "mem_service": "MiB",
    "swap_visible": "MiB",
    "swap_service": "MiB",
    "zram_ratio": "x",
    "kill_delay": "s",
    "lmk_psi_some": "ms/s",
    "lmk_thrashing": "%",
    "java_heap": "MiB",
    "java_heap_large": "MiB",
    "page_size": "KiB",
    "threads": "threads",
    "dram_peak": "GB/s",
    "bw_low": "x",
    "bw_high": "x",
    "storage_read": "MB/s",
    "readahead": "KiB",
    "thermal_burst": "s",
    "thermal_low": "x",
    "thermal_high": "x",
}
"""The unit of each figure; a file that names another one is refused."""
_NEEDED = ("mem_visible", "mem_service")
_MAY_BE_ZERO = frozenset({"swap_visible", "swap_service", "kill_delay", "readahead", "thermal_burst"})
_SHARES = frozenset({"bw_low", "bw_high", "thermal_low", "thermal_high"})
_SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "MB/s": 10**6, "GB/s": 10**9}
_MOST = 1e9
_FILE_LIMIT_BYTES = 1 << 18
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEXTS = ("id", "name", "kind", "soc", "dram", "storage", "qemu_cpu")


@dataclass(frozen=True)
class Figure:
    """A number that can be argued about.

    Attributes:
        value: in the unit.
        unit: as in UNITS.
        basis: where it comes from.
        source: who says so, or by what rule.
    """

    value: float
    unit: str
    basis: Basis
    source: str

    def __post_init__(self) -> None:
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if not number or not math.isfinite(self.value) or not 0 <= self.value <= _MOST:
            raise SimulationError(f"a figure is {self.value!r} {self.unit}, must be a number of 0 or more")
        if self.basis not in get_args(Basis):
            raise SimulationError(
                f"the basis {self.basis!r} of a figure must be one of {', '.join(get_args(Basis))}"
            )
        if not isinstance(self.source, str) or not self.source.strip():
            raise SimulationError(
                f"the figure {self.value:g} {self.unit} has no source; say where it comes from"
            )

    @property
    def bytes(self) -> int:
        """The value in bytes, or bytes per second."""
        return round(self.value * _SIZES[self.unit])

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return {"value": self.value, "unit": self.unit, "basis": self.basis, "source": self.source}


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind.

    Attributes:
        core: name.
        count: how many.
        ghz: highest clock.
        basis: of count and clock.
        source: of both.
    """

    core: str
    count: int
    ghz: float
    basis: Basis
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or not 1 <= self.count <= 1024:
            raise SimulationError(f"a cluster of {self.count!r} cores is not possible; give 1 or more")
        Figure(self.ghz, "GHz", self.basis, self.source)


@dataclass(frozen=True)
class Device:
    """One profile.

    Attributes:
        id: short name, as in `--device`.
        name: for people.
        kind: Android phone, or a board or laptop with plain Linux.
        soc: the chip.
        dram: its memory.
        storage: its storage.
        qemu_cpu: the processor of qemu that is nearest; "" if none is meant.
        clusters: from the largest cores to the smallest; may be empty.
        figures: by the names of UNITS; what is not known is not there.
    """

    id: str
    name: str
    kind: Kind
    soc: str
    dram: str
    storage: str
    qemu_cpu: str
    clusters: tuple[Cluster, ...]
    figures: Mapping[str, Figure]

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise SimulationError(
                f"a device has the id {self.id!r}, must be letters, digits, dots and dashes"
            )
        if self.kind not in get_args(Kind):
            raise SimulationError(
                f"{self.id} is of kind {self.kind!r}, must be one of {', '.join(get_args(Kind))}"
            )
        for name, figure in self.figures.items():
            self._check(name, figure)
        for name in _NEEDED:
            if name not in self.figures:
                raise SimulationError(
                    f"{self.id} does not tell {name}; give it, or mem_total, or ram_marketed, in [figures]"
                )
        total = self.figures.get("mem_total")
        for name in _NEEDED:
            if total is not None and self.figures[name].bytes > total.bytes:
                raise SimulationError(
                    f"{self.id} gives an app {self.figures[name].value:g} MiB ({name}) of "
                    f"{total.value:g} MiB in all; lower it, or correct mem_total"
                )
        for low, high in (("bw_low", "bw_high"), ("thermal_low", "thermal_high")):
            if {low, high} <= self.figures.keys() and self.figures[low].value > self.figures[high].value:
                raise SimulationError(f"{self.id} has a larger {low} than {high}; exchange them")

    def _check(self, name: str, figure: Figure) -> None:
        if name not in UNITS:
            raise SimulationError(
                f"{self.id} has the unknown figure {name!r}; known are {', '.join(sorted(UNITS))}"
            )
        if figure.unit != UNITS[name]:  # a profile that was not read from a file
            raise SimulationError(f"{self.id} gives {name} in {figure.unit!r}, must be in {UNITS[name]}")
        if figure.value == 0 and name not in _MAY_BE_ZERO:
            raise SimulationError(f"{self.id} has {name} 0, must be more; leave it out if it is not known")
        if name in _SHARES and figure.value > 1:
            raise SimulationError(f"{self.id} has {name} {figure.value:g}, must be between 0 and 1")
        if name == "threads" and (figure.value != int(figure.value) or figure.value > 1024):
            raise SimulationError(f"{self.id} has {figure.value:g} threads, must be an integer up to 1024")
        if name == "lmk_psi_some" and figure.value > 1000:
            raise SimulationError(f"{self.id} has lmk_psi_some {figure.value:g}, a second has 1000 ms")

    def value(self, name: str) -> float | None:
        """A figure's number; None if it is not known."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    def bytes(self, name: str, default: int = 0) -> int:
        """A figure in bytes, or bytes per second; `default` if it is not known."""
        figure = self.figures.get(name)
        return default if figure is None else figure.bytes

    @property
    def threads(self) -> int:
        """For inference; as many as there are cores if the profile does not say."""
        found = self.value("threads")
        cores = sum(cluster.count for cluster in self.clusters)
        return int(found) if found is not None else max(1, cores)

    @property
    def cores(self) -> str:
        """The clusters in a few words, such as 4 x Cortex-A76 2.4 GHz."""
        return " + ".join(f"{item.count} x {item.core} {item.ghz:g} GHz" for item in self.clusters)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "soc": self.soc,
            "dram": self.dram,
            "storage": self.storage,
            "qemu_cpu": self.qemu_cpu,
            "clusters": [vars(cluster) for cluster in self.clusters],
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
        }


def list_devices() -> tuple[Device, ...]:
    """All built-in profiles, phones first, by memory."""
    found = [read_device(text, where) for where, text in _built_in()]
    kinds = list(get_args(Kind))
    return tuple(
        sorted(found, key=lambda item: (kinds.index(item.kind), item.bytes("ram_marketed"), item.id))
    )


def find_device(wish: str | Path) -> Device:
    """A profile by id, or of a TOML file by its path.

    Raises:
        SimulationError: there is none, or the file is wrong.
    """
    text = str(wish)
    looks_like_a_path = isinstance(wish, Path) or text.endswith(".toml") or "/" in text
    if not looks_like_a_path:
        known = {device.id: device for device in list_devices()}
        if text in known:
            return known[text]
        near = [name for name in known if name.lower() == text.lower()]
        raise SimulationError(
            f"there is no device {text!r}; take {near[0] if near else 'one of ' + ', '.join(known)}, "
            "or name a TOML file"
        )
    path = Path(wish)
    try:
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise SimulationError(
                f"{path} has more than {_FILE_LIMIT_BYTES} bytes, too many for a device profile"
            )
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SimulationError(
            f"the device file {path} is not UTF-8 text (byte {error.start}); write it as TOML"
        ) from error
    except OSError as error:
        raise SimulationError(
            f"the device file {path} cannot be read: {error.strerror or error}; see --list-devices for "
            "built-in ones"
        ) from error
    return read_device(content, str(path))


def read_device(text: str, where: str) -> Device:
    """A profile from TOML.

    Args:
        text: the document.
        where: its name, for errors.

    Raises:
        SimulationError: it is no TOML, has unknown keys, or figures that cannot be.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SimulationError(f"{where} is not TOML ({error}); correct it there") from error
    if extra := sorted(document.keys() - {*_TEXTS, "clusters", "figures"}):
        raise SimulationError(
            f"{where} has the unknown key {extra[0]!r}; known are {', '.join(_TEXTS)}, clusters and figures"
        )
    texts = {name: document.get(name, "") for name in _TEXTS}
    for name, value in texts.items():
        if not isinstance(value, str) or len(value) > 200:
            raise SimulationError(f"{where} has {name} {value!r}, must be a short text")
    try:
        kind: Any = texts["kind"]
        figures = _figures(document.get("figures", {}), where)
        return Device(
            id=texts["id"],
            name=texts["name"] or texts["id"],
            kind=kind,
            soc=texts["soc"],
            dram=texts["dram"],
            storage=texts["storage"],
            qemu_cpu=texts["qemu_cpu"],
            clusters=_clusters(document.get("clusters", []), where),
            figures=_filled(figures, str(kind)),
        )
    except SimulationError as error:
        raise SimulationError(f"{where}: {error}") from error


@functools.cache
def android_rules() -> Mapping[str, Any]:
    """What android.toml says."""
    text = resources.files(__package__ or "autoglm_edge.android_sim").joinpath("android.toml").read_text()
    return tomllib.loads(text)


def _built_in() -> Iterator[tuple[str, str]]:
    folder = resources.files(__package__ or "autoglm_edge.android_sim").joinpath("devices")
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            yield entry.name, entry.read_text(encoding="utf-8")


def _figures(found: object, where: str) -> dict[str, Figure]:
    if not isinstance(found, dict):
        raise SimulationError(f"figures are {type(found).__name__}, must be a table")
    figures = {}
    for name, entry in found.items():
        if not isinstance(entry, dict):
            source = f"{Path(where).name}, given without a source"
            entry = {"value": entry, "basis": "estimate", "source": source}
        figures[name] = _figure(name, entry)
    return figures


def _figure(name: str, entry: dict[str, Any]) -> Figure:
    given = {"unit": UNITS.get(name, ""), **entry}
    if given.keys() != {"value", "unit", "basis", "source"}:
        raise SimulationError(
            f"the figure {name} has the keys {', '.join(sorted(entry))}, must have value, basis and source, "
            "and may have unit"
        )
    if name in UNITS and given["unit"] != UNITS[name]:  # before a rule reckons with it
        raise SimulationError(f"{name} is given in {given['unit']!r}, must be in {UNITS[name]}")
    try:
        return Figure(given["value"], given["unit"], given["basis"], given["source"])
    except (SimulationError, TypeError) as error:
        raise SimulationError(f"{name}: {error}") from error


def _clusters(found: object, where: str) -> tuple[Cluster, ...]:
    wanted = {"core", "count", "ghz", "basis", "source"}
    if not isinstance(found, list) or not all(
        isinstance(item, dict) and item.keys() == wanted for item in found
    ):
        raise SimulationError(f"clusters must be tables with {', '.join(sorted(wanted))}")
    return tuple(Cluster(**item) for item in found)


def _filled(figures: dict[str, Figure], kind: str) -> dict[str, Figure]:
    """With the rules of the kind where the profile says nothing, in the order of UNITS."""
    rules = android_rules()["defaults"].get("edge" if kind == "laptop" else kind, {})
    found = dict(figures)
    for name, rule in rules.items():
        if name in found:
            continue
        if "share" not in rule:
            found[name] = Figure(rule["value"], UNITS[name], rule["basis"], f"default: {rule['source']}")
        elif (base := found.get(rule["of"])) is not None:
            value = rule["share"] * base.bytes / _SIZES[UNITS[name]]
            source = f"{rule['share']:g} x {rule['of']}: {rule['source']}"
            found[name] = Figure(round(value), UNITS[name], rule["basis"], source)
    return {name: found[name] for name in (*UNITS, *found) if name in found}
