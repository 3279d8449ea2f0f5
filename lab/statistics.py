"""Paired comparisons with bootstrap intervals, shares, and how figures are rounded."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Ratio:
    """A paired ratio with its 95 % percentile interval."""

    value: float
    low: float
    high: float


def paired_ratio(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], seed: int = 0
) -> Ratio:
    """(Σ a / Σ b) after ÷ before, where each side is (a, b) per pair: tokens and steps, say. Pairs are resampled."""
    stacked = np.stack([*before, *after])
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, stacked.shape[1], (RESAMPLES, stacked.shape[1]))
    b_tokens, b_steps, a_tokens, a_steps = stacked[:, picks].sum(-1)
    low, high = np.percentile((a_tokens / a_steps) / (b_tokens / b_steps), [2.5, 97.5])
    totals = stacked.sum(-1)
    return Ratio(float(totals[2] / totals[3] / (totals[0] / totals[1])), float(low), float(high))


def median_ratio(ratios: Floats, seed: int = 0) -> Ratio:
    """The median of paired ratios, each of one repetition."""
    picks = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def proportion(hits: int, of: int) -> Ratio:
    """A share with Wilson's 95 % interval, which is one at 0 and 1 too."""
    z, share = 1.96, hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + (z / (2 * of)) ** 2)
    return Ratio(share, max(0.0, middle - half), min(1.0, middle + half))


def rounded(told: Any) -> Any:
    """The same with four decimals, which is more than anything here is known to."""
    if isinstance(told, dict):
        return {key: rounded(each) for key, each in told.items()}
    if isinstance(told, list | tuple):
        return [rounded(each) for each in told]
    return round(told, 4) if isinstance(told, float) else told
