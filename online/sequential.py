"""Comparing two drafts on live requests, with leave to look after every one of them.

A confidence sequence is an interval that holds the true value at all times at once with probability 1 − α: whoever
looks after every request is deceived no more often than one who looks once. This one is Robbins' normal mixture, the
inverse of the mixture sequential probability ratio test (Johari, Pekelis, Walsh, arXiv 1512.04922), for the difference
of two means with plug-in variances.

Why it fits both of its users: let D be the difference of the arms' means after any number of requests in either, and V
its variance. The covariance of D at two moments is the later V, whichever arm grew in between. So D / V is a Brownian
motion over the time 1 / V, with the true difference as its drift: for any share of requests in one arm, and also where
one arm stands still because it is history.
"""

import math
from dataclasses import dataclass

ALPHA = 0.05  # of all comparisons, those whose interval ever excludes the truth, on either side
EFFECT = 0.05  # differences for which the intervals are narrowest soon: what a cycle gains or a bad draft loses
LEAST_SD = 0.05  # a handful of requests that happen to be alike must not look certain


@dataclass(slots=True)
class Arm:
    """Acceptance rates of one version's requests: their number, mean and variance as they come (Welford)."""

    requests: int = 0
    mean: float = 0.0
    _squares: float = 0.0  # Σ (rate − mean)²

    def add(self, rate: float) -> None:
        self.requests += 1
        off = rate - self.mean
        self.mean += off / self.requests
        self._squares += off * (rate - self.mean)

    @property
    def variance(self) -> float:
        return max(LEAST_SD**2, self._squares / max(1, self.requests - 1))


@dataclass(frozen=True, slots=True)
class Difference:
    """Candidate − baseline in mean acceptance, with the confidence sequence's interval of now."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(candidate: Arm, baseline: Arm) -> Difference:
    """Both arms need a request. Plug-in variances want some twenty in each before anyone acts on the interval."""
    variance = candidate.variance / candidate.requests + baseline.variance / baseline.requests
    mixed = EFFECT**2
    grown = 1 + mixed / variance
    half = math.sqrt(
        variance * (1 + variance / mixed) * (2 * math.log(1 / ALPHA) + math.log(grown))
    )
    mean = candidate.mean - baseline.mean
    return Difference(mean, mean - half, mean + half)
