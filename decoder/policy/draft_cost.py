"""What a step takes longer for what it drafts: learnt from steps as they come.

A step that drafts takes about 1 + s + a · (candidates of the longest sequence) + b · (forwards of the draft model) plain
steps. These are fitted by least squares over recent steps, by how many sequences they had. Where every candidate has been a
forward, only a + b shows, and first assumptions tell the two apart. What else the sequences could do with that time is what
they have emitted of late in a plain step's time.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PRIOR_COST = np.array([0.05, 0.03, 0.12])  # s, a, b where nothing is known
PRIOR_STEPS = 10.0  # that first assumptions count for
MEMORY = 500.0  # steps
PACE_MEMORY = 200.0
STALE = 50  # steps after which a price that nothing has been drafted at is reckoned anew
LEAST = 0.002
SLOWEST = 2.0  # times as long as thought: what takes longer was held up by something else


class DraftCost(NamedTuple):
    """In plain steps, or in tokens that sequences would have emitted meanwhile."""

    per_step: float  # of drafting at all
    per_candidate: float
    per_forward: float

    def scaled(self, factor: float) -> "DraftCost":
        return DraftCost(
            self.per_step * factor, self.per_candidate * factor, self.per_forward * factor
        )


class DraftWork(NamedTuple):
    """What a step drafted."""

    candidates: int  # of the sequence with the most
    forwards: float  # of the draft model


NO_COST = DraftCost(0.0, 0.0, 0.0)


@dataclass(slots=True)
class _Fit:
    """Normal equations."""

    squares: NDArray[np.float64] = field(default_factory=lambda: PRIOR_STEPS * np.eye(3))
    sums: NDArray[np.float64] = field(default_factory=lambda: PRIOR_STEPS * PRIOR_COST)
    solved: DraftCost | None = None  # until a step is added: it is asked for before every step
    steps: int = 0  # by which all of that has yet to fade
    tokens: float = PRIOR_STEPS  # of a sequence
    plain_steps: float = PRIOR_STEPS  # that it took as long as

    @property
    def pace(self) -> float:
        """What a sequence emits in a plain step's time: not less than one token, for it need not draft."""
        return max(1.0, self.tokens / self.plain_steps)

    def price(self) -> DraftCost:
        """In plain steps. With time first assumptions come back, or what once seemed too dear would never be tried."""
        if self.solved is None or self.steps >= STALE:
            self._fade()
            self.solved = DraftCost(*np.linalg.solve(self.squares, self.sums).clip(LEAST).tolist())
        return self.solved

    def emitted(self, tokens: float, plain_steps: float) -> None:
        keep = 1 - 1 / PACE_MEMORY
        self.tokens, self.plain_steps = (
            self.tokens * keep + tokens,
            self.plain_steps * keep + plain_steps,
        )
        self.steps += 1

    def drafted(self, candidates: int, forwards: float, plain_steps: float) -> None:
        work = np.array([1.0, candidates, forwards])
        longer = min(plain_steps, SLOWEST * (1 + float(work @ self.price()))) - 1
        self._fade()
        self.squares += np.outer(work, work)
        self.sums += longer * work
        self.solved = None

    def _fade(self) -> None:
        keep, self.steps = (1 - 1 / MEMORY) ** self.steps, 0
        prior = (1 - keep) * PRIOR_STEPS
        self.squares = self.squares * keep + prior * np.eye(3)
        self.sums = self.sums * keep + prior * PRIOR_COST


@dataclass
class DraftCostModel:
    _by_rows: dict[int, _Fit] = field(default_factory=dict)

    def cost(self, rows: int) -> DraftCost:
        """What drafting costs a step of so many sequences."""
        fit = self._fit(rows)
        return fit.price().scaled(fit.pace * rows)

    def observe(
        self, rows: int, tokens: int, plain_steps: float, drafted: DraftWork | None
    ) -> None:
        """A step emitted so many tokens and took as long as so many plain ones. `drafted`: the most candidates of a
        sequence, and the draft's forwards for them, where these are known."""
        fit = self._fit(rows)
        fit.emitted(tokens / rows, min(plain_steps, SLOWEST * SLOWEST))
        if drafted is not None and drafted[0]:
            fit.drafted(*drafted, plain_steps)

    def _fit(self, rows: int) -> _Fit:
        return self._by_rows.setdefault((rows - 1).bit_length(), _Fit())
