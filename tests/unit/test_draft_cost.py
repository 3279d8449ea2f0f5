"""What drafting costs, found from steps."""

import numpy as np
import pytest

from decoder.policy.draft_cost import MIN_COST, PRIOR_COST, DraftCostModel, DraftWork


def test_nothing_is_known_at_first() -> None:
    assert DraftCostModel().cost(4) == pytest.approx(4 * PRIOR_COST)


def test_candidates_and_forwards_are_told_apart() -> None:
    """From steps that had more of the one or of the other, each number of rows by itself."""
    rng, prices = np.random.default_rng(0), DraftCostModel()
    for _ in range(600):
        candidates = int(rng.integers(1, 8))
        forwards = int(rng.integers(0, candidates + 1))
        for rows, candidate, forward in ((1, 0.05, 0.2), (8, 0.25, 0.1)):
            took = 1.1 + candidate * candidates + forward * forwards + rng.normal(0, 0.05)
            prices.observe(rows, rows, took, DraftWork(candidates, forwards))
    assert prices.cost(1) == pytest.approx((0.1, 0.05, 0.2), abs=0.04)
    assert np.array(prices.cost(5)) / 5 == pytest.approx((0.1, 0.25, 0.1), abs=0.04)


def test_chains_alone_say_what_both_cost_together() -> None:
    rng, prices = np.random.default_rng(0), DraftCostModel()
    for gamma in rng.integers(1, 6, 900).tolist():
        prices.observe(1, 1, 1.05 + gamma * 0.3, DraftWork(gamma, gamma))
    _, candidate, forward = prices.cost(1)
    assert candidate + forward == pytest.approx(0.3, abs=0.01)
    assert forward - candidate == pytest.approx(PRIOR_COST[2] - PRIOR_COST[1], abs=0.01)


def test_nothing_is_ever_free_and_one_slow_step_is_not_everything() -> None:
    rng, prices = np.random.default_rng(0), DraftCostModel()
    for candidates in rng.integers(1, 6, 600).tolist():
        prices.observe(1, 1, 1.1 - 0.02 * candidates, DraftWork(candidates, 0.0))
    assert prices.cost(1).per_candidate == MIN_COST
    prices.observe(1, 1, 1e6, DraftWork(4, 0.0))
    assert prices.cost(1).per_candidate < 0.05


def test_long_steps_of_many_candidates_count_as_long_as_they_take() -> None:
    """With eight rows sixteen candidates take five plain steps: that is no fault of the machine's."""
    rng, prices = np.random.default_rng(0), DraftCostModel()
    for candidates in rng.integers(1, 17, 300).tolist():
        prices.observe(8, 8, 1.1 + 0.25 * candidates, DraftWork(candidates, 0.0))
    assert prices.cost(8).per_candidate / 8 == pytest.approx(0.25, abs=0.01)


def test_time_is_worth_what_the_rows_make_of_it() -> None:
    """In the time of a plain step: twice as many tokens, and never less than one each."""
    prices = DraftCostModel()
    for _ in range(1000):
        prices.observe(4, 12, 1.5, None)
        prices.observe(1, 1, 2.0, None)
    assert prices.cost(4) == pytest.approx(4 * 2 * PRIOR_COST, rel=0.02)
    assert prices.cost(1) == pytest.approx(PRIOR_COST)


def test_what_was_too_dear_is_tried_again() -> None:
    prices = DraftCostModel()
    for _ in range(100):
        prices.observe(1, 1, 4.0, DraftWork(1, 0.0))
    dear = prices.cost(1).per_candidate
    for _ in range(3000):
        prices.observe(1, 1, 1.0, None)
    assert prices.cost(1).per_candidate < 0.2 * dear
