"""When a cycle is due."""

import random
from datetime import timedelta

import pytest

from online.buffer import Depth
from online.settings import Settings
from online.tables import Cycle
from trainer.scheduling import acceptance_drop, backed_off, relative_gain, required_signals


def cycle(state: str, gained: float) -> Cycle:
    return Cycle(
        route="r",
        state=state,
        report={"gate": {"gain": gained * 1.5, "active_tokens_per_step": 1.5}},
    )


def test_a_route_that_gains_little_waits_longer_each_time() -> None:
    """Doubles after each worthless cycle, up to sixteen times; a worthwhile cycle resets it."""
    small, worth = cycle("rejected", 0.001), cycle("promoted", 0.05)
    assert backed_off([], 200) == 200
    assert backed_off([worth, small, small], 200) == 200
    assert backed_off([cycle("canary", 0.05), small, small], 200) == 200
    assert backed_off([small, worth], 200) == 400
    assert backed_off([small, cycle("promoted", 0.005), worth], 200) == 800
    assert backed_off([small] * 8, 200) == 3200
    assert backed_off([cycle("rejected", 0.04)], 200) == 200


def test_a_route_that_gains_much_trains_early() -> None:
    """With half of the signals, but never too few to hold out."""
    assert backed_off([cycle("promoted", 0.3)], 200) == 100
    assert backed_off([cycle("canary", 0.3)], 200) == 100
    assert backed_off([cycle("rejected", 0.3)], 200) == 200
    assert backed_off([cycle("promoted", 0.3)], 30) == 16
    assert backed_off([cycle("promoted", 0.3)], 8) == 8


def test_failed_cycles_do_not_count_as_worthless() -> None:
    """A route goes on as soon as its artifacts are back."""
    assert backed_off([cycle("failed", 0.0)] * 4, 200) == 200


def test_no_route_waits_for_more_than_its_buffer_holds() -> None:
    """Half of the buffer, in count or bytes; before half of the retention ends, what is there."""
    resting, settings = (
        [cycle("rejected", 0.0)] * 8,
        Settings(buffer_bytes=2**26, retention_s=86400),
    )
    for depth, signals in (
        (Depth(0, 0), 3200),
        (Depth(100, 100 * 2**10), 3200),
        (Depth(100, 100 * 2**16), 512),
    ):
        assert required_signals(resting, depth, timedelta(hours=1), settings) == signals
    assert required_signals(resting, Depth(9, 9 * 2**24), timedelta(hours=1), settings) == 50, (
        "not less than after a shift"
    )
    assert required_signals(resting, Depth(100, 2**20), timedelta(hours=13), settings) == 50
    assert required_signals([], Depth(10**4, 10), timedelta(0), Settings(buffer_signals=100)) == 50


def test_unfinished_cycles_and_lost_reports_say_nothing() -> None:
    """A cycle that runs is not counted; one without a gate gained nothing."""
    assert backed_off([cycle("running", 0.0), cycle("promoted", 0.05)], 200) == 200
    assert relative_gain(Cycle(route="r", state="empty", report={"reason": "no signals"})) == 0
    assert backed_off([Cycle(route="r", state="empty", report={})], 200) == 400


def rates(mean: float, count: int, rng: random.Random, deviation: float = 0.2) -> list[float]:
    """Like those of real requests: between 0 and 1, and widely spread."""
    strength = mean * (1 - mean) / deviation**2 - 1
    return [rng.betavariate(mean * strength, (1 - mean) * strength) for _ in range(count)]


def test_a_fall_of_acceptance_is_detected() -> None:
    """From a steady 0.55 to 0.25: within 50 requests of the shift, in all of 50 streams."""
    for seed in range(50):
        rng = random.Random(seed)
        seen = rates(0.55, 60, rng) + rates(0.25, 50, rng)
        assert acceptance_drop(seen, 0.55).startswith("a shift: acceptance fell from 0.550 to 0.")


@pytest.mark.parametrize("promised", [0.55, None])
def test_steady_traffic_is_no_shift(promised: float | None) -> None:
    """Fewer than one alarm in twenty over 200 requests, with either reference."""
    alarms = sum(
        bool(acceptance_drop(rates(0.55, 200, random.Random(seed)), promised))
        for seed in range(200)
    )
    assert alarms <= 10


def test_too_few_requests_are_no_shift() -> None:
    """Fifteen bad ones may be chance."""
    assert acceptance_drop([0.0] * 15, 0.5) == ""
    assert acceptance_drop([0.5] * 40, None) == ""
