"""Estimates the speed of each drafter in a workload.

The fastest drafter may differ between workloads, such as batches of one and
of eight. There are many workloads, and each starts without measurements. So
a workload borrows estimates from similar workloads, with the model

    log speed = effect of the workload + effect of the drafter

and relies more on its own rounds as they accumulate.

Legend: W workloads of a route, A drafters (the bandit's arms).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROUND_STEPS = 16
MEMORY_ROUNDS = 40.0
ROUND_SPREAD = 0.4  # deviation of a round's log speed with one sequence
MAX_BORROWED_ROUNDS = 1.0  # weight of the most similar workload, in rounds
FIT_ITERATIONS = 4
STEP_DECAY = (1 - 1 / MEMORY_ROUNDS) ** (1 / ROUND_STEPS)
EPSILON = 1e-9


class Workload(NamedTuple):
    """What the fastest drafter may depend on."""

    route: str
    log2_batch_size: int  # rounded up
    greedy: bool

    @classmethod
    def of(cls, route: str, batch_size: int, greedy: bool) -> "Workload":
        return cls(route, (batch_size - 1).bit_length(), greedy)

    @property
    def spread(self) -> float:
        """Standard deviation of a round's log speed; a batch averages over texts."""
        return ROUND_SPREAD / math.sqrt(2**self.log2_batch_size)

    def max_borrowed_rounds(self, other: "Workload") -> float:
        """The most rounds that another workload of the same route counts for."""
        if self == other:
            return math.inf
        distance = abs(self.log2_batch_size - other.log2_batch_size)
        distance += self.greedy != other.greedy
        return MAX_BORROWED_ROUNDS / distance**2


@dataclass(slots=True)
class SpeedRecord:
    """Measurements of one drafter in one workload. They decay."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: float = 0.0

    @property
    def log_speed(self) -> float:
        return math.log(self.tokens / self.seconds) if self.seconds else 0.0

    def add_step(self, tokens: int, seconds: float) -> None:
        self.tokens = self.tokens * STEP_DECAY + tokens
        self.seconds = self.seconds * STEP_DECAY + seconds
        self.rounds = self.rounds * STEP_DECAY + 1 / ROUND_STEPS


Records = dict[Workload, dict[str, SpeedRecord]]  # of one route


class Estimate(NamedTuple):
    """The estimated speed of a drafter in a workload."""

    log_speed: float  # of tokens per second
    rounds: float  # own and borrowed, that it rests on

    def upper_bound(self, spread: float) -> float:
        """Upper confidence bound of the log speed; infinite for an unknown drafter."""
        if not self.rounds:
            return math.inf
        return self.log_speed + math.log(1 + spread / math.sqrt(self.rounds))


def estimate_speeds(records: Records, workload: Workload) -> dict[str, Estimate]:
    """By drafter. Combines a workload's own measurements with borrowed ones."""
    by_workload = [list(each.values()) for each in records.values()]
    log_speed_WA = np.array([[one.log_speed for one in each] for each in by_workload])
    rounds_WA = np.array([[one.rounds for one in each] for each in by_workload])
    own = list(records).index(workload)
    limit_W = np.array([workload.max_borrowed_rounds(other) for other in records])
    weight_WA = np.minimum(rounds_WA, limit_W[:, None])
    fitted_A = _fit_effects(log_speed_WA, weight_WA)[own]
    # The errors of other workloads are correlated, so their rounds do not add up.
    borrowed_A = np.delete(weight_WA, own, 0).max(0, initial=0.0)
    total_A = rounds_WA[own] + borrowed_A
    sum_A = rounds_WA[own] * log_speed_WA[own] + borrowed_A * fitted_A
    mean_A = sum_A / np.maximum(total_A, EPSILON)
    estimates = map(Estimate, mean_A.tolist(), total_A.tolist())
    return dict(zip(records[workload], estimates, strict=True))


def _fit_effects(log_speed_WA: Floats, weight_WA: Floats) -> Floats:
    """Workload effect + drafter effect, by alternating least squares, [W, A]."""
    weight_W1 = np.maximum(weight_WA.sum(1, keepdims=True), EPSILON)
    weight_A = np.maximum(weight_WA.sum(0), EPSILON)
    drafter_A = np.zeros(log_speed_WA.shape[1])
    for _ in range(FIT_ITERATIONS):
        residual_WA = weight_WA * (log_speed_WA - drafter_A)
        workload_W1 = residual_WA.sum(1, keepdims=True) / weight_W1
        drafter_A = (weight_WA * (log_speed_WA - workload_W1)).sum(0) / weight_A
    fitted_WA: Floats = workload_W1 + drafter_A
    return fitted_WA
