"""Comparison of two drafts on live requests that may be looked at after every request.

A confidence sequence is an interval that holds the true value at all times at once with
probability 1 − α. Looking after every request errs no more often than looking once. This one is
Robbins' normal mixture for the difference of two means with plug-in variances. It is the inverse
of the mixture sequential probability ratio test (Johari, Pekelis, Walsh, arXiv 1512.04922).

It fits both of its users. Let D be the difference of the arms' means after any number of requests
in either arm, and V its variance. The covariance of D at two moments is the later V, whichever
arm grew in between. So D / V is a Brownian motion over the time 1 / V, and its drift is the true
difference. That holds for any share of requests in one arm, and also if one arm is history and
no longer grows.
"""

import math
from dataclasses import dataclass

ALPHA = 0.05  # share of comparisons whose interval ever excludes the truth
EFFECT = 0.05  # difference at which intervals narrow fastest: a usual gain or loss
LEAST_SD = 0.05  # a few requests that happen to be alike must not look certain


@dataclass(slots=True)
class Arm:
    """Acceptance rates of one version's requests: number, running mean and variance (Welford)."""

    requests: int = 0
    mean: float = 0.0
    _squares: float = 0.0  # Σ (rate − mean)²

    def add(self, rate: float) -> None:
        self.requests += 1
        deviation = rate - self.mean
        self.mean += deviation / self.requests
        self._squares += deviation * (rate - self.mean)

    @property
    def variance(self) -> float:
        return max(LEAST_SD**2, self._squares / max(1, self.requests - 1))


@dataclass(frozen=True, slots=True)
class Difference:
    """Candidate − baseline in mean acceptance, with its present confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(candidate: Arm, baseline: Arm) -> Difference:
    """The difference of two arms, each with at least one request.

    Act on the interval only after some twenty requests in each: its variances are estimates.
    """
    variance = candidate.variance / candidate.requests + baseline.variance / baseline.requests
    prior = EFFECT**2
    spread = 2 * math.log(1 / ALPHA) + math.log(1 + prior / variance)
    half_width = math.sqrt(variance * (1 + variance / prior) * spread)
    mean = candidate.mean - baseline.mean
    return Difference(mean, mean - half_width, mean + half_width)
