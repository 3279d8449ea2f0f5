"""The confidence sequence: right at all times at once, on acceptances that look like real ones."""

import numpy as np
import pytest

from online.rollout import Rules, Trial, Verdict
from online.sequential import ALPHA, Arm, difference

RULES = Rules(min_requests=20, max_requests=400, margin=0.03)
RUNS = 200


def rates(rng: np.random.Generator, mean: float, count: int, sd: float = 0.2) -> list[float]:
    """Beta-distributed, as acceptances of requests are."""
    weight = mean * (1 - mean) / sd**2 - 1
    return list(rng.beta(mean * weight, (1 - mean) * weight, count))


def tried(gain: float, share: float, seed: int, rules: Rules = RULES) -> tuple[Verdict, int]:
    """A trial that is looked at after every request: its verdict, and the requests it took."""
    rng, trial, count = np.random.default_rng(seed), Trial(2, 1, rules), 6000
    arms = {1: rates(rng, 0.6, count), 2: rates(rng, 0.6 + gain, count)}
    for i in range(count):
        version = 2 if rng.random() < share else 1
        trial.observe(version, arms[version][i])
        if (verdict := trial.verdict()) is not None:
            return verdict, i + 1
    raise AssertionError("no verdict")


def share_of(outcome: str, gain: float, share: float) -> float:
    return float(np.mean([tried(gain, share, seed)[0].outcome == outcome for seed in range(RUNS)]))


def test_an_arm_is_the_mean_and_variance_of_what_it_saw() -> None:
    """Kept as they come, equal to numpy's of all of them; equal rates are not certainty."""
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
    """Two equal arms, looked at after each of 2,000 requests: at most α of the runs ever exclude 0."""
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
    """The guard's case: 200 requests of history, and a successor that is looked at after each of its 500."""
    excluded = 0
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        history, live = Arm(), Arm()
        for rate in rates(rng, 0.6, 200):
            history.add(rate)
        for rate in rates(rng, 0.6, 500):
            live.add(rate)
            if (
                live.requests >= 20
                and abs((seen := difference(live, history)).mean) > seen.high - seen.mean
            ):
                excluded += 1
                break
    assert excluded <= ALPHA * RUNS


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_an_equal_candidate_is_rarely_aborted(share: float) -> None:
    """At most 5 %, with the rule for the undecided included."""
    assert share_of("aborted", 0.0, share) <= 0.05


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_a_worse_candidate_is_rarely_promoted(share: float) -> None:
    """Worse by 0.06, twice the margin: at most 5 %."""
    assert share_of("promoted", -0.06, share) <= 0.05


def test_what_is_plain_is_decided_soon() -> None:
    """A ruinous candidate and a good one take tens of requests, not hundreds."""
    for gain, outcome in ((-0.3, "aborted"), (0.15, "promoted")):
        found = [tried(gain, 0.2, seed) for seed in range(20)]
        assert {verdict.outcome for verdict, _ in found} == {outcome}
        assert np.median([requests for _, requests in found]) < 150


def test_a_candidate_that_cannot_be_compared_is_taken_at_the_gates_word() -> None:
    """γ may be 0 throughout: then no request compares anything, and after the last one it is promoted."""
    trial = Trial(2, 1, Rules(min_requests=2, max_requests=5, margin=0.03))
    for _ in range(5):
        trial.observe(2, None)
        assert trial.verdict() is None
    for _ in range(5):
        trial.observe(1, None)
        trial.observe(7, 0.0)
    verdict = trial.verdict()
    assert verdict is not None
    assert (verdict.outcome, "on the gate's report alone" in verdict.reason) == ("promoted", True)
