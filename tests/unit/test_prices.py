"""What drafting costs, found from steps."""

import numpy as np
import pytest

from decoder.prices import FIRST, LEAST, Prices


def test_nothing_is_known_at_first() -> None:
    assert Prices().of(1, 2.0) == pytest.approx(2 * FIRST[1:])


def test_candidates_and_forwards_are_told_apart() -> None:
    """From steps that had more of the one or of the other, each number of rows by itself."""
    rng, prices = np.random.default_rng(0), Prices()
    for _ in range(600):
        candidates = int(rng.integers(1, 8))
        forwards = int(rng.integers(0, candidates + 1))
        prices.observe(1, candidates, forwards, 1.1 + 0.05 * candidates + 0.2 * forwards + rng.normal(0, 0.05))
        prices.observe(8, candidates, forwards, 1.1 + 0.25 * candidates + 0.1 * forwards + rng.normal(0, 0.05))
    assert prices.of(1, 1.0) == pytest.approx((0.05, 0.2), abs=0.04)
    assert prices.of(5, 1.0) == pytest.approx((0.25, 0.1), abs=0.04)


def test_chains_alone_say_what_both_cost_together() -> None:
    rng, prices = np.random.default_rng(0), Prices()
    for gamma in rng.integers(1, 6, 900).tolist():
        prices.observe(2, gamma, gamma, 1.05 + gamma * 0.3)
    candidate, forward = prices.of(2, 1.0)
    assert candidate + forward == pytest.approx(0.3, abs=0.01)
    assert forward - candidate == pytest.approx(FIRST[2] - FIRST[1], abs=0.01)


def test_nothing_is_ever_free_and_one_slow_step_is_not_everything() -> None:
    rng, prices = np.random.default_rng(0), Prices()
    for candidates in rng.integers(1, 6, 600).tolist():
        prices.observe(1, candidates, 0, 1.1 - 0.02 * candidates)
    assert prices.of(1, 1.0).candidate == LEAST
    prices.observe(1, 4, 0, 1e6)
    assert prices.of(1, 1.0).candidate < 0.05
