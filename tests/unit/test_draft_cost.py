"""The cost of drafting, fitted from simulated steps."""

import numpy as np
import pytest

from decoder.policy.draft_cost import MIN_COST, PRIOR_COST, DraftCostModel, DraftWork


def test_the_prior_holds_without_steps() -> None:
    """Scaled to the tokens that the batch would emit."""
    assert DraftCostModel().cost(4) == pytest.approx(4 * PRIOR_COST)


def test_candidates_and_forwards_are_told_apart() -> None:
    """Steps have more of one or of the other; batch sizes are fitted separately."""
    rng = np.random.default_rng(0)
    model = DraftCostModel()
    for _ in range(600):
        candidates = int(rng.integers(1, 8))
        work = DraftWork(candidates, int(rng.integers(0, candidates + 1)))
        for batch_size, per_candidate, per_forward in ((1, 0.05, 0.2), (8, 0.25, 0.1)):
            plain_steps = 1.1 + per_candidate * candidates + per_forward * work.forwards
            plain_steps += rng.normal(0, 0.05)
            model.observe(batch_size, batch_size, plain_steps, work)
    assert model.cost(1) == pytest.approx((0.1, 0.05, 0.2), abs=0.04)
    assert np.array(model.cost(5)) / 5 == pytest.approx((0.1, 0.25, 0.1), abs=0.04)


def test_chains_alone_show_the_sum_of_both_costs() -> None:
    """One forward for each candidate: the prior divides the sum."""
    model = DraftCostModel()
    for gamma in np.random.default_rng(0).integers(1, 6, 900).tolist():
        model.observe(1, 1, 1.05 + gamma * 0.3, DraftWork(gamma, gamma))
    _, candidate, forward = model.cost(1)
    assert candidate + forward == pytest.approx(0.3, abs=0.01)
    assert forward - candidate == pytest.approx(PRIOR_COST[2] - PRIOR_COST[1], abs=0.01)


def test_costs_stay_positive_and_one_slow_step_changes_little() -> None:
    """Steps get faster with more candidates; then one step takes a million plain ones."""
    model = DraftCostModel()
    for candidates in np.random.default_rng(0).integers(1, 6, 600).tolist():
        model.observe(1, 1, 1.1 - 0.02 * candidates, DraftWork(candidates, 0.0))
    assert model.cost(1).per_candidate == MIN_COST
    model.observe(1, 1, 1e6, DraftWork(4, 0.0))
    assert model.cost(1).per_candidate < 0.05


def test_long_steps_of_many_candidates_count_in_full() -> None:
    """Sixteen candidates take five plain steps: slow, but no outlier."""
    model = DraftCostModel()
    for candidates in np.random.default_rng(0).integers(1, 17, 300).tolist():
        model.observe(8, 8, 1.1 + 0.25 * candidates, DraftWork(candidates, 0.0))
    assert model.cost(8).per_candidate / 8 == pytest.approx(0.25, abs=0.01)


def test_time_is_worth_the_tokens_that_the_batch_emits_in_it() -> None:
    """Two tokens of each sequence in a plain step's time, and never less than one."""
    model = DraftCostModel()
    for _ in range(1000):
        model.observe(4, 12, 1.5, None)
        model.observe(1, 1, 2.0, None)
    assert model.cost(4) == pytest.approx(4 * 2 * PRIOR_COST, rel=0.02)
    assert model.cost(1) == pytest.approx(PRIOR_COST)


def test_high_costs_decay_so_that_drafting_is_tried_again() -> None:
    """Plain steps alone bring the prior back."""
    model = DraftCostModel()
    for _ in range(100):
        model.observe(1, 1, 4.0, DraftWork(1, 0.0))
    high = model.cost(1).per_candidate
    for _ in range(3000):
        model.observe(1, 1, 1.0, None)
    assert model.cost(1).per_candidate < 0.2 * high
