"""Speculation control: how many tokens a step drafts, from what steps cost and how much of a draft is accepted.

The rate that is maximised is tokens per second of the whole batch: Σ_rows E[tokens | γ] ÷ seconds of a step with γ, where
a row with acceptance rate α emits (1 − α^(γ+1)) / (1 − α) tokens (Leviathan et al., arXiv 2211.17192, equation 1). γ = 0 is
the plain step, with no draft work at all.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from decoder.models import LanguageModel

FIRST_GUESS = 0.7  # acceptance of a draft that nothing is known about: high enough to be tried
ROUTE_MEMORY = 200.0  # compared positions that a route's mean remembers
ROW_MEMORY = 32.0
PRIOR_POSITIONS = 6.0  # positions of its own after which a row counts as much as its route
MARGIN = 1.02  # speculation must promise this much more than plain steps: estimates are noisy
PROBE_SHARE = 0.01  # of the time that plain steps take, for looking whether drafting would pay again
LEARNING_RATE = 0.1
SURPRISE = 0.5  # a step may be slow for reasons of the machine's own: its logarithm counts up to this


class Acceptance:
    """A running mean of Σ min(p, q) over compared positions, which forgets."""

    def __init__(self, memory: float, parent: "Acceptance | None" = None) -> None:
        self._memory, self.parent = memory, parent
        self._sum = self._count = 0.0

    @property
    def rate(self) -> float:
        prior = self.parent.rate if self.parent else FIRST_GUESS
        return (self._sum + prior * PRIOR_POSITIONS) / (self._count + PRIOR_POSITIONS)

    def add(self, overlap: float, compared: int) -> None:
        keep = math.exp(-compared / self._memory)
        self._sum, self._count = self._sum * keep + overlap, self._count * keep + compared
        if self.parent:
            self.parent.add(overlap, compared)

    def forget(self) -> None:
        """The draft has changed: what was seen says little about the new one."""
        self._sum = self._count = 0.0


class StepCosts:
    """Seconds of a step, by rows and γ: measured at start, corrected by every step since.

    log seconds = log measured at start + correction of this number of rows + correction of this γ. So a γ that has not
    been tried lately still follows what its neighbours show: longer contexts, a busier machine.
    """

    def __init__(self, max_gamma: int, slots: int) -> None:
        self._buckets = [1 << i for i in range((slots - 1).bit_length() + 1)]
        self._start = np.zeros((len(self._buckets), max_gamma + 1))
        self._by_rows = np.zeros(len(self._buckets))
        self._by_gamma = np.zeros_like(self._start)

    def measure(self, target: LanguageModel, draft: LanguageModel, slots: int) -> None:
        """Runs both models on empty slots. Only while no sequence is in them."""
        gammas = np.arange(self._start.shape[1])
        for i, bucket in enumerate(self._buckets):
            rows = min(bucket, slots)
            one, all_ = _forward_s(target, rows, 1), _forward_s(target, rows, len(gammas))
            verify_s = one + (all_ - one) * gammas / max(1, gammas[-1])
            self._start[i] = np.log(verify_s + gammas * _forward_s(draft, rows, 1))

    def seconds(self, rows: int) -> NDArray[np.float64]:
        """By γ, [max_gamma + 1]."""
        i = self._bucket(rows)
        seconds: NDArray[np.float64] = np.exp(self._start[i] + self._by_rows[i] + self._by_gamma[i])
        return seconds

    def observe(self, rows: int, gamma: int, seconds: float) -> None:
        i = self._bucket(rows)
        known = self._start[i, gamma] + self._by_rows[i] + self._by_gamma[i, gamma]
        surprise = LEARNING_RATE * max(-SURPRISE, min(SURPRISE, math.log(seconds) - known))
        self._by_rows[i] += surprise
        self._by_gamma[i, gamma] += surprise

    def _bucket(self, rows: int) -> int:
        return (rows - 1).bit_length()


def expected_tokens(rates_B: Sequence[float], max_gamma: int) -> NDArray[np.float64]:
    """Σ over rows of the tokens that a step emits, by γ: [max_gamma + 1]."""
    powers = np.asarray(rates_B)[:, None] ** np.arange(max_gamma + 1)
    total: NDArray[np.float64] = powers.sum(0).cumsum()
    return total


@dataclass
class Control:
    """Chooses γ for a batch. A row whose request says its own γ keeps it."""

    costs: StepCosts
    max_gamma: int
    credit_s: float = 0.0  # time that probes may spend

    def gamma(self, rates_B: Sequence[float], rows: int) -> int:
        """`rates_B` are the acceptance rates of the rows that leave γ to us; the others emit what they emit anyway."""
        if not rates_B:
            return 0
        seconds = self.costs.seconds(rows)
        speed = (expected_tokens(rates_B, self.max_gamma) + (rows - len(rates_B))) / seconds
        best = int(speed.argmax())
        return best if speed[best] > MARGIN * speed[0] else 0

    def stepped(self, rows: int, gamma: int, seconds: float) -> None:
        if gamma <= self.max_gamma:  # a request may ask for more
            self.costs.observe(rows, gamma, seconds)
        if gamma == 0:
            self.credit_s = min(self.credit_s + PROBE_SHARE * seconds, seconds)

    def spent(self, seconds: float) -> None:
        """A probe took this long."""
        self.credit_s -= seconds


def _forward_s(model: LanguageModel, rows: int, new: int) -> float:
    ids_BT = torch.zeros((rows, new), dtype=torch.long)
    starts_B = torch.zeros(rows, dtype=torch.long)
    return _median_s(lambda: model.forward(slice(0, rows), ids_BT, starts_B, new)[0, -1, :1].tolist())


def _median_s(work: Callable[[], object], times: int = 5) -> float:
    work()  # the first call allocates
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[times // 2]
