"""The confidence sequence holds at all times at once, on realistic acceptance rates."""

import numpy as np
import pytest

from online.rollout import CanaryTest, Decision, Rules
from online.sequential import ALPHA, Arm, difference

RULES = Rules(min_requests=20, max_requests=400, margin=0.03)
RUNS = 200


def rates(rng: np.random.Generator, mean: float, count: int, sd: float = 0.2) -> list[float]:
    """Beta-distributed, like acceptance rates of requests."""
    weight = mean * (1 - mean) / sd**2 - 1
    return list(rng.beta(mean * weight, (1 - mean) * weight, count))


def decided(gain: float, share: float, seed: int, rules: Rules = RULES) -> tuple[Decision, int]:
    """The decision of a test that is looked at after every request, and the requests it took."""
    rng, test, count = np.random.default_rng(seed), CanaryTest(2, 1, rules), 6000
    arms = {1: rates(rng, 0.6, count), 2: rates(rng, 0.6 + gain, count)}
    for i in range(count):
        version = 2 if rng.random() < share else 1
        test.observe(version, arms[version][i])
        if (decision := test.decision()) is not None:
            return decision, i + 1
    raise AssertionError("no decision")


def share_of(outcome: str, gain: float, share: float) -> float:
    return float(
        np.mean([decided(gain, share, seed)[0].outcome == outcome for seed in range(RUNS)])
    )


def test_an_arm_has_the_mean_and_variance_of_its_rates() -> None:
    """Running values equal numpy's. Equal rates are not taken as certainty."""
    seen, same = Arm(), Arm()
    sample = rates(np.random.default_rng(0), 0.5, 100)
    for rate in sample:
        seen.add(rate)
        same.add(0.5)
    assert (seen.requests, seen.mean, seen.variance) == pytest.approx(
        (100, np.mean(sample), np.var(sample, ddof=1))
    )
    assert same.variance > 0


def test_the_interval_holds_the_truth_at_every_look() -> None:
    """Two equal arms over 2,000 requests: at most α of the runs ever exclude 0."""
    excluded = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        one, other = Arm(), Arm()
        for i, rate in enumerate(rates(rng, 0.6, 2000)):
            (one if i % 4 == 0 else other).add(rate)
            if one.requests >= 20:
                seen = difference(one, other)
                if not seen.low <= 0 <= seen.high:
                    excluded += 1
                    break
    assert excluded <= ALPHA * RUNS


def test_the_interval_holds_the_truth_beside_an_arm_that_stands_still() -> None:
    """The guard's case: 200 requests of history, and a successor with 500 requests."""
    excluded = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        history, live = Arm(), Arm()
        for rate in rates(rng, 0.6, 200):
            history.add(rate)
        for rate in rates(rng, 0.6, 500):
            live.add(rate)
            if live.requests < 20:
                continue
            seen = difference(live, history)
            if abs(seen.mean) > seen.high - seen.mean:
                excluded += 1
                break
    assert excluded <= ALPHA * RUNS


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_an_equal_candidate_is_rarely_aborted(share: float) -> None:
    """At most 5 %, including decisions by the mean."""
    assert share_of("aborted", 0.0, share) <= 0.05


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_worse_candidate_is_rarely_promoted(share: float) -> None:
    """Worse by 0.06, twice the margin: at most 5 %."""
    assert share_of("promoted", -0.06, share) <= 0.05


def test_large_differences_are_decided_soon() -> None:
    """Much worse and much better candidates take tens of requests, not hundreds."""
    for gain, outcome in ((-0.3, "aborted"), (0.15, "promoted")):
        found = [decided(gain, 0.2, seed) for seed in range(20)]
        assert {decision.outcome for decision, _ in found} == {outcome}
        assert np.median([requests for _, requests in found]) < 150


def test_a_candidate_that_cannot_be_compared_is_promoted_on_the_gates_report() -> None:
    """With γ = 0 throughout, no request compares anything. The last one promotes it."""
    test = CanaryTest(2, 1, Rules(min_requests=2, max_requests=5, margin=0.03))
    for _ in range(5):
        test.observe(2, None)
        assert test.decision() is None
    for _ in range(5):
        test.observe(1, None)
        test.observe(7, 0.0)
    decision = test.decision()
    assert decision is not None
    assert decision.outcome == "promoted"
    assert "on the gate's report alone" in decision.reason
