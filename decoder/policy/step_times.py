"""Seconds of a step, by sequences and γ."""

import math
from collections.abc import Mapping

import numpy as np

SURPRISE = (
    0.5  # a step may be slow for reasons of the machine's own: its logarithm counts up to this
)
GAMMA_LEARNS, ROWS_LEARN = 0.05, 0.02  # shares of a surprise that corrections take up


class StepTimes:
    """Seconds of a step, by sequences and γ: measured at start, corrected by every step since.

    log seconds = log measured at start + correction of this number of sequences + correction of this γ. The first one moves
    slowly and for all γ, so that a γ that has not been tried lately follows what its neighbours show: longer contexts,
    a busier machine.
    """

    def __init__(self, max_gamma: int, slots: int) -> None:
        self.batch_sizes = [
            min(1 << i, slots) for i in range((slots - 1).bit_length() + 1)
        ]  # numbers of sequences told apart
        self._start = [[0.0] * (max_gamma + 1) for _ in self.batch_sizes]
        self._by_rows = [0.0] * len(self.batch_sizes)
        self._by_gamma = [[0.0] * (max_gamma + 1) for _ in self.batch_sizes]

    def calibrate(self, rows: int, seconds: Mapping[int, float]) -> None:
        """Seconds by γ, for some of them; in between they are interpolated."""
        gammas, i = sorted(seconds), self._bucket(rows)
        known = [seconds[gamma] for gamma in gammas]
        self._start[i] = np.log(np.interp(np.arange(len(self._start[i])), gammas, known)).tolist()
        self._by_rows[i], self._by_gamma[i] = 0.0, [0.0] * len(self._start[i])

    def seconds(self, rows: int) -> list[float]:
        """By γ, from 0 to the largest."""
        i = self._bucket(rows)
        by_rows = self._by_rows[i]
        return [
            math.exp(start + by_rows + own)
            for start, own in zip(self._start[i], self._by_gamma[i], strict=True)
        ]

    def observe(self, rows: int, gamma: int, seconds: float, weight: float = GAMMA_LEARNS) -> None:
        i = self._bucket(rows)
        known = self._start[i][gamma] + self._by_rows[i] + self._by_gamma[i][gamma]
        surprise = max(-SURPRISE, min(SURPRISE, math.log(seconds) - known))
        self._by_rows[i] += ROWS_LEARN * surprise
        self._by_gamma[i][gamma] += weight * surprise

    def _bucket(self, rows: int) -> int:
        return (rows - 1).bit_length()
