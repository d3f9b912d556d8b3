"""Device profiles: built-in ones are complete and sourced, a wrong file is refused with a sentence."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.android_sim.android import limiter_set, lmkd_risk, play_band
from autoglm_edge.android_sim.device import (
    UNITS,
    Device,
    Figure,
    android_rules,
    find_device,
    list_devices,
    read_device,
)
from autoglm_edge.errors import SimulationError

PHONES = [
    *("sd695-4", "sd7g3-8", "sd8g2-12", "tensorG3-12", "tensorG4-16", "sd8g3-16", "d9300-16", "d9400-16"),
    *("sd8elite-24", "phone-4", "phone-6", "phone-8", "phone-12", "phone-16"),
]
BOARDS = ["rpi5-8", "rpi5-16", "orinnano-8", "rk3588-16", "n100-16", "laptop-16"]
MINE = 'id = "mine"\nkind = "phone"\n[figures]\nram_marketed = 8\n'


def test_every_phone_and_board_of_the_table_is_there() -> None:
    assert sorted(device.id for device in list_devices()) == sorted(PHONES + BOARDS)


def test_every_figure_of_every_profile_has_a_unit_a_basis_and_a_source() -> None:
    for device in list_devices():
        for name, figure in device.figures.items():
            assert figure.unit == UNITS[name]
            assert figure.basis in ("published", "derived", "measured", "estimate")
            assert len(figure.source) > 5, f"{device.id} {name}"
            assert "given without a source" not in figure.source, f"{device.id} {name}"


def test_every_profile_tells_what_a_projection_needs() -> None:
    for device in list_devices():
        for name in ("mem_total", "mem_visible", "mem_service", "dram_peak", "storage_read", "threads"):
            assert name in device.figures, f"{device.id} lacks {name}"
        assert device.clusters
        assert device.threads <= sum(cluster.count for cluster in device.clusters)


def test_a_service_has_less_than_an_app_in_front_on_a_phone_and_the_same_on_a_board() -> None:
    for device in list_devices():
        visible, service = device.bytes("mem_visible"), device.bytes("mem_service")
        assert service < visible if device.kind == "phone" else service == visible


def test_the_files_hold_what_the_schema_of_the_module_allows_and_nothing_else() -> None:
    folder = resources.files("autoglm_edge.android_sim").joinpath("devices")
    for entry in folder.iterdir():
        document = tomllib.loads(entry.read_text())
        assert entry.name == f"{document['id']}.toml"
        assert all({"value", "unit", "basis", "source"} == set(item) for item in document["figures"].values())


def test_a_profile_of_ones_own_is_filled_in_by_the_rules_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)

    device = find_device(path)

    assert device.bytes("mem_total") == round(0.92 * 8 * 1024) << 20
    assert device.value("mem_visible") == round(device.bytes("mem_total") / 2 / 2**20)
    assert device.value("mem_service") == round(device.bytes("mem_total") / 4 / 2**20)
    assert device.figures["ram_marketed"].basis == "estimate"
    assert "mine.toml" in device.figures["ram_marketed"].source
    assert "0.5 x mem_total" in device.figures["mem_visible"].source
    assert device.value("dram_peak") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id = ", "is not TOML"),
        ('id = "x"\nkind = "phone"\ncolour = "red"', "unknown key 'colour'"),
        (MINE.replace('"phone"', '"watch"'), "kind 'watch'"),
        (MINE.replace('"mine"', '"../x"'), "has the id"),
        (MINE.replace("kind", "name"), "kind ''"),
        ('id = "x"\nkind = "phone"', "does not tell mem_visible"),
        (MINE + "mem_visble = 3", "unknown figure 'mem_visble'"),
        (MINE + "mem_visible = -1", "must be a number of 0 or more"),
        (MINE + "mem_visible = 0", "mem_visible 0, must be more"),
        (MINE + "mem_visible = nan", "must be a number"),
        (MINE + "mem_visible = inf", "must be a number"),
        (MINE + "mem_visible = true", "must be a number"),
        (MINE + 'mem_visible = "much"', "must be a number"),
        (MINE + "mem_visible = 99999", "of 7537 MiB in all"),
        (MINE + "bw_high = 3", "between 0 and 1"),
        (MINE + "bw_low = 0.9", "larger bw_low than bw_high"),
        (MINE + "threads = 2.5", "must be an integer"),
        (
            MINE + 'mem_visible = { value = 3, unit = "GB", basis = "derived", source = "x" }',
            "must be in MiB",
        ),
        (MINE + 'mem_visible = { value = 3, basis = "guessed", source = "me" }', "basis 'guessed'"),
        (MINE + 'mem_visible = { value = 3, basis = "derived", source = " " }', "has no source"),
        (MINE + "mem_visible = { value = 3 }", "must have value, basis and source"),
        ('figures = 3\nid = "x"\nkind = "phone"', "figures are int"),
        ('id = "x"\nkind = "phone"\nclusters = [1]\n[figures]\nram_marketed = 8', "clusters must be tables"),
        ('id = 3\nkind = "phone"', "must be a short text"),
    ],
)
def test_a_wrong_profile_is_refused_and_named(text: str, reason: str) -> None:
    with pytest.raises(SimulationError, match=r"mine\.toml") as caught:
        read_device(text, "mine.toml")
    assert reason in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_profile_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("device") / "x.toml"
    path.write_bytes(data)
    with pytest.raises(SimulationError):
        find_device(path)


def test_a_file_that_is_missing_a_folder_or_huge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="cannot be read"):
        find_device(tmp_path / "none.toml")
    with pytest.raises(SimulationError, match="cannot be read"):
        find_device(tmp_path)
    (tmp_path / "huge.toml").write_bytes(b"#" * (1 << 19))
    with pytest.raises(SimulationError, match="too many"):
        find_device(tmp_path / "huge.toml")


def test_an_unknown_id_lists_what_there_is_and_a_near_one_is_named() -> None:
    with pytest.raises(SimulationError, match="one of phone-4, sd695-4"):
        find_device("iphone")
    with pytest.raises(SimulationError, match="take tensorG4-16"):
        find_device("TENSORG4-16")


def test_a_figure_in_bytes_follows_its_unit() -> None:
    assert Figure(2, "MiB", "estimate", "test").bytes == 2 << 20
    assert Figure(2.5, "GB/s", "estimate", "test").bytes == 2_500_000_000


def test_the_limiter_set_is_the_largest_that_a_device_reaches() -> None:
    names = [
        found and found.name for total in (3000, 4096, 8192, 15000) if (found := _set(total)) or not found
    ]
    assert names == [None, "4 GB example", "default of AOSP's tests", "14 GB example"]
    largest = limiter_set(15000 << 20, "service")
    assert largest is not None
    assert largest.kill_bytes == 8192 << 20


def _set(total_mib: int) -> object:
    return limiter_set(total_mib << 20, "visible")


def test_plays_bands_follow_memory_and_state_and_small_devices_have_none() -> None:
    small = play_band(3000 << 20, "visible", 10**12)
    middle = play_band(7578 << 20, "visible", 2_250_000_001)
    large = play_band(15073 << 20, "service", 2_000_000_000)
    assert small is not None and small.threshold_bytes is None and small.kept
    assert middle is not None and middle.threshold_bytes == 2_250_000_000 and not middle.kept
    assert large is not None and large.name == "16 GB" and large.kept
    assert play_band(0, "visible", 1) is None


def test_each_marketed_size_falls_into_the_band_of_its_label() -> None:
    for size in (4, 6, 8, 12, 16):
        band = play_band(find_device(f"phone-{size}").bytes("mem_total"), "visible", 0)
        assert band is not None and band.name == f"{size} GB"


def test_the_killers_risk_rises_with_the_share_of_anonymous_memory() -> None:
    assert [lmkd_risk(share, 100) for share in (39, 40, 50, 51)] == ["low", "elevated", "elevated", "high"]
    assert lmkd_risk(10, 0) == "unknown"


def test_every_rule_has_a_basis_and_a_source() -> None:
    rules = android_rules()
    entries = [*rules["limiter_sets"], *rules["play_bands"], rules["lmkd_risk"]]
    entries += [rule for kind in rules["defaults"].values() for rule in kind.values()]
    assert all(entry["basis"] in ("published", "derived", "measured", "estimate") for entry in entries)
    assert all(len(entry["source"]) > 10 or "see " in entry["source"] for entry in entries)


def test_a_device_cannot_be_changed_into_a_wrong_one() -> None:
    device = find_device("phone-8")
    with pytest.raises(SimulationError, match="mem_service"):
        dataclasses.replace(device, figures={"mem_visible": device.figures["mem_visible"]})
    assert isinstance(device, Device)
