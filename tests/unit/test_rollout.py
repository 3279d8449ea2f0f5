"""The guard finds regressions and gives no false alarms."""

import numpy as np

from online.rollout import Regression, RolloutGuard


def feed(guard: RolloutGuard, version: int, rates: list[float]) -> Regression | None:
    for rate in rates:
        if (found := guard.observe("r", version, rate)) is not None:
            return found
    return None


def around(mean: float, count: int, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 0.1, count).clip(0, 1))


def test_a_worse_version_is_reported_once() -> None:
    """The report names both versions."""
    guard = RolloutGuard(20)
    guard.started("r", 1, watched=True)
    assert feed(guard, 1, around(0.6, 50)) is None
    guard.started("r", 2, watched=True)
    found = feed(guard, 2, around(0.3, 100, 1))
    assert found is not None
    assert (found.version, found.baseline_version, found.live.requests) == (2, 1, 20)
    assert "below version 1's" in found.reason
    assert feed(guard, 2, around(0.3, 100, 2)) is None


def test_a_version_that_came_by_rollback_is_not_watched() -> None:
    """The guard would return to the same version."""
    guard = RolloutGuard(20)
    guard.started("r", 2, watched=True)
    feed(guard, 2, around(0.9, 50))
    guard.started("r", 1, watched=False)
    assert feed(guard, 1, around(0.2, 100)) is None


def test_a_version_that_hardly_served_passes_its_baseline_on() -> None:
    """Two activations in a row do not make the guard forget the earlier baseline."""
    guard = RolloutGuard(20)
    guard.started("r", 1, watched=True)
    feed(guard, 1, around(0.6, 50))
    guard.started("r", 2, watched=True)
    feed(guard, 2, around(0.6, 3))
    guard.started("r", 3, watched=True)
    found = feed(guard, 3, around(0.3, 50))
    assert found is not None
    assert found.baseline_version == 1


def test_a_version_made_after_a_shift_is_compared_on_the_new_traffic() -> None:
    """Its predecessor's acceptance on the old traffic is no baseline."""
    for successor, worse in ((0.4, False), (0.02, True)):
        guard = RolloutGuard(20)
        guard.started("r", 1, watched=True)
        feed(guard, 1, [*around(0.6, 400), *around(0.2, 50, 1)])
        guard.started("r", 2, watched=True)
        assert (feed(guard, 2, around(successor, 100, 2)) is not None) == worse


def test_a_run_of_easy_requests_is_no_baseline() -> None:
    """The latest requests of a version may be easy. All its recent requests count, too."""
    guard = RolloutGuard(20)
    guard.started("r", 1, watched=True)
    feed(guard, 1, [*around(0.4, 400), *around(0.7, 50, 1)])
    guard.started("r", 2, watched=True)
    assert feed(guard, 2, around(0.43, 100, 2)) is None


def test_other_versions_requests_do_not_count() -> None:
    """A late answer of the old version is not counted for the new one."""
    guard = RolloutGuard(20)
    guard.started("r", 1, watched=True)
    feed(guard, 1, around(0.6, 50))
    guard.started("r", 2, watched=True)
    assert feed(guard, 1, around(0.1, 100)) is None
    assert guard.live("r") is None


def test_an_equal_version_is_rarely_rolled_back() -> None:
    """At most 5 of 200 equal successors over 300 requests each."""
    alarms = 0
    for seed in range(200):
        guard = RolloutGuard(20)
        guard.started("r", 1, watched=True)
        feed(guard, 1, around(0.5, 200, seed))
        guard.started("r", 2, watched=True)
        alarms += feed(guard, 2, around(0.5, 300, 1000 + seed)) is not None
    assert alarms <= 5
