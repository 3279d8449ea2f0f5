"""Confidence intervals of paired differences. Legend: R requests."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

Floats = NDArray[np.float64]
RESAMPLES = 2000


def bootstrap_interval(
    differences_R: Floats, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The bootstrap interval of the mean, widened for small samples; infinite without evidence.

    Percentiles alone are too narrow for few requests, as is a normal
    interval with the sample's own deviation: on real differences, 95 %
    intervals of 8 requests promoted up to 8 % of equal candidates. Both
    bounds move away from the mean by the factor that turns such a normal
    interval into Student's.
    """
    count = len(differences_R)
    if count < 2 or not np.isfinite(differences_R).all():
        return -math.inf, math.inf
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, count, (RESAMPLES, count))
    tails = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(differences_R[picks].mean(1), tails)
    mean, wider = float(differences_R.mean()), _widening(count, tails[1])
    return mean + wider * float(low - mean), mean + wider * float(high - mean)


def _widening(count: int, share: float) -> float:
    """Student's interval of `count` samples over the normal one without Bessel's correction."""
    quantiles = stdtrit(count - 1, share) / ndtri(share)
    return math.sqrt(count / (count - 1)) * float(quantiles)
