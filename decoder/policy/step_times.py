"""Seconds of a step, by batch size and γ."""

import math
from collections.abc import Mapping

import numpy as np

MAX_LOG_ERROR = 0.5  # clipped to this: one step may be slow by chance
GAMMA_LEARNING_RATE = 0.05
BATCH_LEARNING_RATE = 0.02


class StepTimes:
    """Predicts the seconds of a step: calibrated at start, corrected by each step.

        log seconds = calibrated + correction by batch size + correction by γ

    The correction by batch size moves slowly and covers all γ. A γ without
    recent steps therefore follows its neighbours when contexts get longer
    or the machine gets busier. Batch sizes are rounded up to a power of
    two, or to the number of slots.
    """

    def __init__(self, max_gamma: int, slots: int) -> None:
        buckets = (slots - 1).bit_length() + 1
        self.batch_sizes = [min(1 << bucket, slots) for bucket in range(buckets)]
        self._calibrated = [[0.0] * (max_gamma + 1) for _ in self.batch_sizes]
        self._by_batch_size = [0.0] * len(self.batch_sizes)
        self._by_gamma = [[0.0] * (max_gamma + 1) for _ in self.batch_sizes]

    def calibrate(self, batch_size: int, seconds: Mapping[int, float]) -> None:
        """Sets the seconds by γ, interpolates between them, drops corrections."""
        bucket = _bucket(batch_size)
        gammas = np.arange(len(self._calibrated[bucket]))
        known = sorted(seconds)
        interpolated = np.interp(gammas, known, [seconds[gamma] for gamma in known])
        self._calibrated[bucket] = np.log(interpolated).tolist()
        self._by_batch_size[bucket] = 0.0
        self._by_gamma[bucket] = [0.0] * len(gammas)

    def seconds(self, batch_size: int) -> list[float]:
        """By γ, from 0 to the largest."""
        bucket = _bucket(batch_size)
        shared = self._by_batch_size[bucket]
        return [
            math.exp(calibrated + shared + own)
            for calibrated, own in zip(
                self._calibrated[bucket],
                self._by_gamma[bucket],
                strict=True,
            )
        ]

    def observe(
        self,
        batch_size: int,
        gamma: int,
        seconds: float,
        learning_rate: float = GAMMA_LEARNING_RATE,
    ) -> None:
        """Corrects the prediction; `learning_rate` is that of the γ's correction."""
        bucket = _bucket(batch_size)
        by_gamma = self._by_gamma[bucket]
        predicted = self._calibrated[bucket][gamma] + self._by_batch_size[bucket]
        error = math.log(seconds) - predicted - by_gamma[gamma]
        error = max(-MAX_LOG_ERROR, min(MAX_LOG_ERROR, error))
        self._by_batch_size[bucket] += BATCH_LEARNING_RATE * error
        by_gamma[gamma] += learning_rate * error


def _bucket(batch_size: int) -> int:
    return (batch_size - 1).bit_length()
