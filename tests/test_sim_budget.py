"""What an app may have: taken from a profile, refused where it cannot be, and warming up over time."""

from __future__ import annotations

import math

import pytest

from autoglm_edge.android_sim.budget import Budget
from autoglm_edge.android_sim.device import find_device, list_devices
from autoglm_edge.errors import SimulationError


def test_a_budget_takes_limit_swap_and_threads_of_its_state() -> None:
    device = find_device("sd8g3-16")
    visible, service = Budget.of(device), Budget.of(device, "service")
    assert visible.limit_bytes == device.bytes("mem_visible")
    assert service.limit_bytes == device.bytes("mem_service") < visible.limit_bytes
    assert visible.kill_bytes == visible.limit_bytes + device.bytes("swap_visible")
    assert visible.threads == 6
    assert visible.kill_delay_s == 30
    assert visible.android


def test_a_board_has_no_limiter_and_kills_at_once() -> None:
    budget = Budget.of(find_device("rpi5-8"))
    assert not budget.android
    assert budget.kill_delay_s == 0
    assert budget.swap_bytes == 0


def test_every_profile_gives_a_budget_in_both_states() -> None:
    for device in list_devices():
        for state in ("visible", "service"):
            budget = Budget.of(device, state)
            assert 0 < budget.limit_bytes <= budget.mem_total_bytes


def test_speed_stays_full_for_the_burst_and_falls_to_the_sustained_share() -> None:
    budget = Budget("x", "visible", 1 << 30, thermal_burst_s=100, thermal_sustained=0.6)
    shares = [budget.cpu_share(at_s) for at_s in (0, 100, 150, 200, 400, 2000)]
    assert shares[:2] == [1.0, 1.0]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.6, abs=1e-6)
    assert budget.cpu_share(200) == pytest.approx(1 - 0.4 * (1 - math.exp(-1)))


def test_without_a_burst_speed_is_the_sustained_one_at_once_and_without_heat_it_stays() -> None:
    hot = Budget("x", "visible", 1 << 30, thermal_burst_s=0, thermal_sustained=0.5)
    assert hot.cpu_share(0.1) == 0.5
    assert Budget("x", "visible", 1 << 30).cpu_share(1e6) == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "cached"}, "the state is 'cached'"),
        ({"limit_bytes": 1000}, "1 MiB at least"),
        ({"swap_bytes": -1}, "must not be negative"),
        ({"kill_delay_s": -1.0}, "kill delay"),
        ({"kill_delay_s": math.nan}, "kill delay"),
        ({"psi_some_ms_per_s": 0}, "pressure limits"),
        ({"psi_some_ms_per_s": 1001}, "pressure limits"),
        ({"threads": 0}, "threads are not possible"),
        ({"storage_bytes_per_s": 0.0}, "must be above 0"),
        ({"thermal_sustained": 1.1}, "between 0 and 1"),
        ({"thermal_burst_s": math.nan}, "must be 0 or more"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(changes: dict[str, object], reason: str) -> None:
    values: dict[str, object] = {"device": "x", "state": "visible", "limit_bytes": 1 << 30}
    with pytest.raises(SimulationError, match=reason):
        Budget(**{**values, **changes})  # type: ignore[arg-type]


def test_an_unknown_state_of_a_device_is_refused() -> None:
    with pytest.raises(SimulationError, match="must be one of visible, service"):
        Budget.of(find_device("phone-8"), "frozen")  # type: ignore[arg-type]
