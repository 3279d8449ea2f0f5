"""How much longer a step takes because it drafts.

Measured in plain steps, a step that drafts takes about

    1 + s + a · (most candidates of a sequence) + b · (draft forwards)

Least squares over recent steps of a batch size finds s, a and b. When every
candidate takes a forward, only a + b can be observed; the prior then
divides the sum between the two.

A plain step's time is worth the tokens that the sequences emit in that time
at their recent speed.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PRIOR_COST = np.array([0.05, 0.03, 0.12])  # s, a, b
PRIOR_STEPS = 10.0  # steps that weigh as much as the prior
COST_MEMORY = 500.0  # steps
SPEED_MEMORY = 200.0  # steps
MAX_UNSOLVED_STEPS = 50  # then the fit is solved again
MIN_COST = 0.002  # plain steps
MAX_SLOWDOWN = 2.0  # measured over predicted time: the excess has other causes


class DraftCost(NamedTuple):
    """The cost of drafting, in plain steps or in tokens."""

    per_step: float
    per_candidate: float
    per_forward: float

    def scaled(self, factor: float) -> "DraftCost":
        return DraftCost(
            factor * self.per_step,
            factor * self.per_candidate,
            factor * self.per_forward,
        )


NO_COST = DraftCost(0.0, 0.0, 0.0)


class DraftWork(NamedTuple):
    """What a step drafted."""

    candidates: int  # of the sequence with the most
    forwards: float  # of the draft model


@dataclass
class DraftCostModel:
    """The cost of drafting by batch size, rounded up to a power of two."""

    _fits: dict[int, "_CostFit"] = field(default_factory=dict)

    def cost(self, batch_size: int) -> DraftCost:
        """In tokens that the batch would emit in the same time."""
        fit = self._fit(batch_size)
        return fit.cost().scaled(fit.tokens_per_plain_step * batch_size)

    def observe(
        self, batch_size: int, tokens: int, plain_steps: float, work: DraftWork | None
    ) -> None:
        """Learns from a step.

        Args:
            tokens: emitted by the whole batch.
            plain_steps: the step's time divided by that of a plain step.
            work: what the step drafted, if its drafters count it.
        """
        fit = self._fit(batch_size)
        fit.add_speed(tokens / batch_size, min(plain_steps, MAX_SLOWDOWN**2))
        if work is not None and work.candidates:
            fit.add_cost(work, plain_steps)

    def _fit(self, batch_size: int) -> "_CostFit":
        return self._fits.setdefault((batch_size - 1).bit_length(), _CostFit())


@dataclass(slots=True)
class _CostFit:
    """The fit's normal equations and a sequence's speed, for one batch size."""

    squares: Floats = field(default_factory=lambda: PRIOR_STEPS * np.eye(3))
    sums: Floats = field(default_factory=lambda: PRIOR_STEPS * PRIOR_COST)
    solved: DraftCost | None = None  # kept until a step that drafts is added
    pending_decay: int = 0  # steps by which the equations have yet to decay
    tokens: float = PRIOR_STEPS  # of a sequence
    plain_steps: float = PRIOR_STEPS  # in which it emitted them

    @property
    def tokens_per_plain_step(self) -> float:
        """A sequence's tokens in a plain step's time. At least 1: the plain step's."""
        return max(1.0, self.tokens / self.plain_steps)

    def cost(self) -> DraftCost:
        """In plain steps.

        Decays to the prior, so that drafting is tried again after high
        costs.
        """
        if self.solved is None or self.pending_decay >= MAX_UNSOLVED_STEPS:
            self._decay()
            solution = np.linalg.solve(self.squares, self.sums)
            self.solved = DraftCost(*solution.clip(MIN_COST).tolist())
        return self.solved

    def add_speed(self, tokens: float, plain_steps: float) -> None:
        decay = 1 - 1 / SPEED_MEMORY
        self.tokens = self.tokens * decay + tokens
        self.plain_steps = self.plain_steps * decay + plain_steps
        self.pending_decay += 1

    def add_cost(self, work: DraftWork, plain_steps: float) -> None:
        terms = np.array([1.0, work.candidates, work.forwards])
        predicted = 1 + float(terms @ self.cost())
        extra = min(plain_steps, MAX_SLOWDOWN * predicted) - 1
        self._decay()
        self.squares += np.outer(terms, terms)
        self.sums += extra * terms
        self.solved = None

    def _decay(self) -> None:
        decay = (1 - 1 / COST_MEMORY) ** self.pending_decay
        self.pending_decay = 0
        prior = (1 - decay) * PRIOR_STEPS
        self.squares = self.squares * decay + prior * np.eye(3)
        self.sums = self.sums * decay + prior * PRIOR_COST
