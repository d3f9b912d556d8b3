"""The projected speed: a range around measured phones, bound by what is slowest, never a number by itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoglm_edge.android_sim.device import find_device, read_device
from autoglm_edge.android_sim.projection import Range, project
from autoglm_edge.errors import SimulationError

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("device", "weights_gb", "measured"),
    [
        ("sd8g3-16", 3.98, 10.85),  # Llama 3 8B, 4 bits, CPU, OnePlus 12
        ("sd8g3-16", 2.16, 19.7),  # Llama 3.2 3B SpinQuant
        ("sd8g3-16", 0.87, 50.2),  # Llama 3.2 1B SpinQuant
        ("rpi5-16", 4.6, 2.1),  # Llama 3.1 8B, Ollama
        ("rpi5-16", 7.4, 1.36),  # Llama 2 13B
    ],
)
def test_published_runs_of_good_engines_lie_in_the_projected_range(
    device: str, weights_gb: float, measured: float
) -> None:
    found = project(find_device(device), weights_bytes=int(weights_gb * GB))
    assert found is not None
    assert found.burst.low <= measured <= found.burst.high


def test_the_9b_on_a_flagship_is_as_the_roofline_says() -> None:
    found = project(find_device("sd8g3-16"), weights_bytes=int(4.8 * GB))
    assert found is not None
    assert (found.burst.low, found.burst.high) == (pytest.approx(5.6), pytest.approx(9.6))
    assert found.sustained.low == pytest.approx(2.8)
    assert found.sustained.high == pytest.approx(6.72)
    assert found.bound == "memory"


def test_weights_from_storage_bind_by_the_storage() -> None:
    found = project(find_device("sd8g3-16"), weights_bytes=5 * GB, storage_bytes=5 * GB)
    assert found is not None
    assert found.bound == "storage"
    assert found.burst.high == pytest.approx(0.84)
    assert found.burst.low < found.burst.high


def test_heat_does_not_slow_storage_down() -> None:
    found = project(find_device("phone-4"), weights_bytes=GB, storage_bytes=50 * GB)
    assert found is not None
    assert found.sustained.high == pytest.approx(found.burst.high)


def test_keys_and_values_are_read_as_well() -> None:
    device = find_device("phone-16")
    short = project(device, weights_bytes=5 * GB)
    long = project(device, weights_bytes=5 * GB, kv_bytes=2 * GB)
    assert short is not None and long is not None
    assert long.burst.high == pytest.approx(short.burst.high * 5 / 7)


@given(st.integers(1, 10**11), st.integers(0, 10**10), st.integers(0, 10**11))
def test_a_range_is_never_upside_down_and_warm_is_never_faster(weights: int, keys: int, storage: int) -> None:
    found = project(find_device("phone-8"), weights_bytes=weights, kv_bytes=keys, storage_bytes=storage)
    assert found is not None
    assert 0 < found.burst.low <= found.burst.high
    assert found.sustained.low <= found.burst.low
    assert found.sustained.high <= found.burst.high


def test_nothing_is_projected_from_a_profile_that_does_not_tell() -> None:
    bare = read_device('id = "x"\nkind = "phone"\n[figures]\nram_marketed = 8', "x.toml")
    assert project(bare, weights_bytes=GB) is None
    memory = read_device('id = "x"\nkind = "phone"\n[figures]\nram_marketed = 8\ndram_peak = 50', "x.toml")
    assert project(memory, weights_bytes=GB) is not None
    assert project(memory, weights_bytes=GB, storage_bytes=1) is None
    assert project(memory, weights_bytes=0) is None


def test_what_a_projection_rests_on_is_said_with_its_basis() -> None:
    found = project(find_device("sd8g3-16"), weights_bytes=GB, storage_bytes=GB)
    assert found is not None
    words = " ".join(found.assumptions)
    assert all(name in words for name in ("dram_peak 76.8", "bw_low", "storage_read", "estimate", "derived"))
    assert found.to_json()["burst"] == [found.burst.low, found.burst.high]


def test_a_range_must_rise() -> None:
    with pytest.raises(SimulationError, match="must rise"):
        Range(2, 1)
    assert [str(Range(*item)) for item in ((0.01, 0.02), (1.5, 3), (100, 200))] == [
        "0.01 to 0.02",
        "1.50 to 3.00",
        "100 to 200",
    ]
