"""The choice of γ: expected tokens, the fastest γ, and the budget for probes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.policy.gamma import (
    MAX_DRAFTED_STEPS,
    MIN_SPEEDUP,
    PROBE_SHARE,
    GammaController,
    expected_tokens,
)
from decoder.policy.step_times import StepTimes

MAX_GAMMA = 6
SLOTS = 8
GAMMAS = range(MAX_GAMMA + 1)


def controller(plain: float, drafted: float) -> GammaController:
    """Calibrated with steps where every drafted token costs the same."""
    times = StepTimes(MAX_GAMMA, SLOTS)
    for batch_size in times.batch_sizes:
        times.calibrate(batch_size, {gamma: plain + gamma * drafted for gamma in GAMMAS})
    return GammaController(times, MAX_GAMMA)


# ── expected tokens ──


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 8))
def test_expected_tokens_are_the_sum_over_all_outcomes(rates: list[float], max_gamma: int) -> None:
    """A sequence emits the accepted tokens and one token of the target's."""
    found = expected_tokens(rates, max_gamma)
    for gamma in range(max_gamma + 1):
        total = 0.0
        for rate in rates:
            rejected = [rate**n * (1 - rate) * (n + 1) for n in range(gamma)]
            total += sum(rejected) + rate**gamma * (gamma + 1)
        assert found[gamma] == pytest.approx(total)


# ── the choice ──


def test_a_draft_that_is_never_accepted_is_not_used() -> None:
    """However cheap it is."""
    assert controller(1.0, 0.001).choose_gamma([0.0], 1) == 0
    assert controller(1.0, 0.05).choose_gamma([0.02] * 4, 4) == 0


def test_gamma_grows_with_acceptance_and_shrinks_with_cost() -> None:
    """From 0 to the maximum, and back."""
    by_rate = [controller(1.0, 0.1).choose_gamma([a], 1) for a in (0.05, 0.3, 0.6, 0.8, 0.99)]
    assert by_rate == sorted(by_rate)
    assert (by_rate[0], by_rate[-1]) == (0, MAX_GAMMA)
    by_cost = [controller(1.0, cost).choose_gamma([0.8], 1) for cost in (0.01, 0.1, 0.3, 1.0)]
    assert by_cost == sorted(by_cost, reverse=True)
    assert (by_cost[0], by_cost[-1]) == (MAX_GAMMA, 0)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("speedup", "drafts"), [(1.0, False), (0.99 * MIN_SPEEDUP, False), (1.05 * MIN_SPEEDUP, True)]
)
def test_drafting_needs_a_minimum_speedup(rate: float, speedup: float, drafts: bool) -> None:
    """Every γ > 0 has the same speedup over a plain step."""
    tokens = expected_tokens([rate], MAX_GAMMA)
    times = StepTimes(MAX_GAMMA, SLOTS)
    times.calibrate(1, {g: tokens[g] / (speedup if g else 1.0) for g in GAMMAS})
    assert (GammaController(times, MAX_GAMMA).choose_gamma([rate], 1) > 0) == drafts


def test_sequences_with_their_own_gamma_count_in_the_choice() -> None:
    """They wait for longer steps: what pays for one sequence alone may not pay for eight."""
    made = controller(1.0, 0.3)
    assert made.choose_gamma([0.7], 1) > 0
    assert made.choose_gamma([0.7], 8) == 0
    assert made.choose_gamma([], 8) == 0


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=4),
    st.lists(st.floats(0.1, 10), min_size=MAX_GAMMA + 1, max_size=MAX_GAMMA + 1),
)
def test_the_chosen_gamma_is_the_fastest(rates: list[float], seconds: list[float]) -> None:
    """No γ promises more tokens per second, up to the margin of the plain step."""
    times = StepTimes(MAX_GAMMA, SLOTS)
    times.calibrate(4, dict(enumerate(seconds)))
    speed = np.array(expected_tokens(rates, MAX_GAMMA)) / times.seconds(4)
    chosen = GammaController(times, MAX_GAMMA).choose_gamma(rates, len(rates))
    if chosen:
        assert speed[chosen] == pytest.approx(speed.max())
        assert speed[chosen] > MIN_SPEEDUP * speed[0]
    else:
        assert speed.max() <= MIN_SPEEDUP * speed[0] * (1 + 1e-9)


# ── what steps change ──


def test_a_plain_step_is_due_after_many_drafted_ones() -> None:
    """It measures the plain step's time again; then drafting goes on."""
    made = controller(1.0, 0.1)
    for _ in range(MAX_DRAFTED_STEPS):
        assert made.choose_gamma([0.9], 1) > 0
        made.observe_step(1, 4, 1.4, 1)
    assert made.choose_gamma([0.9], 1) == 0
    made.observe_step(1, 0, 1.0, 1)
    assert made.choose_gamma([0.9], 1) > 0


def test_a_gamma_above_the_maximum_leaves_step_times_alone() -> None:
    """A request may ask for one."""
    made = controller(1.0, 0.5)
    before = made.step_times.seconds(1)
    made.observe_step(1, MAX_GAMMA + 1, 30.0, 1)
    assert made.step_times.seconds(1) == before


def test_plain_steps_earn_the_budget_for_probes() -> None:
    """Drafted steps earn nothing, and the budget never exceeds one step."""
    made = controller(1.0, 0.5)
    made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(PROBE_SHARE)
    made.observe_step(1, 2, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(PROBE_SHARE)
    made.charge_probe(1.0)
    for _ in range(round(1 / PROBE_SHARE) - 2):
        made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s < 0
    for _ in range(round(2 / PROBE_SHARE)):
        made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(1.0)
