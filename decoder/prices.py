"""What a step takes longer for what it drafts: learnt from steps as they come.

A step that drafts takes about 1 + s + a · (candidates of the longest row) + b · (forwards of the draft model) plain
steps. These are fitted by least squares over recent steps, by how many rows they had. Where every candidate has been a
forward, only a + b shows, and first assumptions tell the two apart.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FIRST = np.array([0.05, 0.03, 0.12])  # s, a, b where nothing is known
PRIOR_STEPS = 10.0  # that first assumptions count for
MEMORY = 500.0  # steps
LEAST = 0.002
SLOWEST = 3.0  # plain steps: what takes longer was held up by something else


class Price(NamedTuple):
    """Tokens that a row would have emitted plainly meanwhile."""

    candidate: float
    forward: float


FREE = Price(0.0, 0.0)


@dataclass(slots=True)
class _Fit:
    """Normal equations."""

    squares: NDArray[np.float64] = field(default_factory=lambda: PRIOR_STEPS * np.eye(3))
    sums: NDArray[np.float64] = field(default_factory=lambda: PRIOR_STEPS * FIRST)
    price: Price | None = None  # the solution, until a step is added: it is asked for before every step

    def add(self, candidates: int, forwards: float, longer: float) -> None:
        keep, work = 1 - 1 / MEMORY, np.array([1.0, candidates, forwards])
        prior = (1 - keep) * PRIOR_STEPS  # what fades of it comes back
        self.squares = self.squares * keep + np.outer(work, work) + prior * np.eye(3)
        self.sums = self.sums * keep + longer * work + prior * FIRST
        self.price = None

    def solved(self) -> Price:
        if self.price is None:
            _, candidate, forward = np.linalg.solve(self.squares, self.sums).tolist()
            self.price = Price(max(LEAST, candidate), max(LEAST, forward))
        return self.price


@dataclass
class Prices:
    _by_rows: dict[int, _Fit] = field(default_factory=dict)

    def of(self, rows: int, pace: float) -> Price:
        """`pace` is what a row emits in the time of a plain step as things go."""
        candidate, forward = self._fit(rows).solved()
        return Price(pace * candidate, pace * forward)

    def observe(self, rows: int, candidates: int, forwards: float, plain_steps: float) -> None:
        """A step took as long as so many plain ones."""
        self._fit(rows).add(candidates, forwards, min(plain_steps, SLOWEST) - 1)

    def _fit(self, rows: int) -> _Fit:
        return self._by_rows.setdefault((rows - 1).bit_length(), _Fit())
