"""The gate's error rates: how often a candidate passes that should not, and the other way round."""

import numpy as np
import pytest

from tests.unit.test_gate import verdict
from trainer.gate import LEVEL
from trainer.intervals import bootstrap_interval


@pytest.mark.parametrize("requests", [8, 12, 40, 100])
def test_equal_candidates_pass_in_at_most_one_of_twenty(requests: int) -> None:
    """2,000 null comparisons for each count. Percentiles alone are too narrow for few requests."""
    rng = np.random.default_rng(0)
    passed = sum(
        bootstrap_interval(rng.normal(0, 0.3, requests), seed, LEVEL)[0] > 0 for seed in range(2000)
    )
    assert passed <= 100


def promoted(gain: float, lost: float, count: int = 200) -> float:
    """The share of `count` candidates that passes on 200 new and 100 earlier requests.

    Differences are as wide and as skewed as real ones.
    """
    rng = np.random.default_rng(0)
    wide = lambda mean, size: 2.0 * (mean + 0.12 * (rng.gamma(2.0, 1.0, size) - 2.0) / np.sqrt(2.0))
    return (
        sum(verdict(wide(gain, 200), wide(-lost, 100), seed=i).promote for i in range(count))
        / count
    )


def test_the_gate_is_seldom_wrong() -> None:
    """Equal candidates, better ones, and better ones that forget: 5 % and 90 % are asked."""
    assert promoted(0.0, 0.0) <= 0.05
    assert promoted(0.03, 0.0) >= 0.9
    assert promoted(0.03, 0.06) <= 0.05
