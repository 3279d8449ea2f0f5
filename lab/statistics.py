"""Estimates with 95 % intervals: paired ratios and differences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from trainer.intervals import bootstrap_interval

Floats = NDArray[np.float64]
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        value, low, high = (format(each, spec or ".2f") for each in self.figures)
        return f"{value} ({low} to {high})"

    def __str__(self) -> str:
        return format(self)

    @property
    def figures(self) -> list[float]:
        return [self.value, self.low, self.high]


def paired_ratio(before: Sequence[Floats], after: Sequence[Floats]) -> Estimate:
    """(Σ a / Σ b) after, divided by the same before, where a side is (a, b) per pair.

    With a the tokens and b the steps of each query it is the ratio of two τ. Pairs are resampled.
    """

    def ratio(*sides: Floats, axis: int) -> Floats:
        old_a, old_b, new_a, new_b = (side.sum(axis) for side in sides)
        return (new_a / new_b) / (old_a / old_b)

    return _bootstrap([*before, *after], ratio)


def median_ratio(ratios: Sequence[float] | Floats) -> Estimate:
    """The median of paired ratios, each of one repetition."""
    return _bootstrap([np.asarray(ratios, float)], np.median)


def paired_difference(ours_R: Floats, theirs_R: Floats) -> Estimate:
    """The mean difference over requests R, with the interval that the trainer's gate uses."""
    difference_R = ours_R - theirs_R
    return Estimate(float(difference_R.mean()), *bootstrap_interval(difference_R, seed=0))


def _bootstrap(samples: Sequence[Floats], statistic: Callable[..., Floats]) -> Estimate:
    """Percentile bootstrap over paired observations; of a single one there is no interval."""
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:
        return Estimate(value, value, value)
    low, high = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(low), float(high))
