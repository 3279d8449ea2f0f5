"""Acceptance rates of a draft: running means by sequence, by route and by rank."""

import math

PRIOR_RATE = 0.7  # of an unknown draft: high enough for it to be tried
PRIOR_POSITIONS = 6.0  # compared positions that weigh as much as the prior
ROUTE_MEMORY = 2000.0  # compared positions that a route's mean remembers
SEQUENCE_MEMORY = 32.0  # the same of a sequence's mean
MAX_RANK = 8  # candidates of a node that have rates of their own
RANK_DECAY = 0.3  # prior: acceptance of candidate k + 1 divided by that of candidate k
RATE_STEP = 0.05  # rank rates are rounded, so that tree shapes stay


class Acceptance:
    """The acceptance rate α: a running mean of Σ min(p, q) over compared positions.

    The mean of `parent` is the prior: a sequence starts from its route's
    rate.
    """

    def __init__(self, memory: float, parent: "Acceptance | None" = None) -> None:
        self._memory = memory
        self.parent = parent
        self._sum = 0.0
        self._count = 0.0

    @property
    def rate(self) -> float:
        prior = self.parent.rate if self.parent else PRIOR_RATE
        total = self._sum + prior * PRIOR_POSITIONS
        return total / (self._count + PRIOR_POSITIONS)

    def add(self, overlap: float, compared: int) -> None:
        """Adds Σ min(p, q) over `compared` positions, here and to the parent."""
        decay = math.exp(-compared / self._memory)
        self._sum = self._sum * decay + overlap
        self._count = self._count * decay + compared
        if self.parent:
            self.parent.add(overlap, compared)

    def reset(self) -> None:
        """Forgets the old draft's counts when a new draft is installed."""
        self._sum = 0.0
        self._count = 0.0


class RankAcceptance:
    """How often nodes accept their k-th candidate. Decides the shape of trees."""

    def __init__(self, acceptance: Acceptance) -> None:
        # Chains draft first candidates too: α is the prior of the first rank.
        self._acceptance = acceptance
        self.reset()

    @property
    def rates(self) -> tuple[float, ...]:
        """By rank, rounded to `RATE_STEP`."""
        prior = self._acceptance.rate
        rates = []
        for accepted, verified in zip(self._accepted, self._verified, strict=True):
            total = accepted + prior * PRIOR_POSITIONS
            rates.append(total / (verified + PRIOR_POSITIONS))
            prior = RANK_DECAY * rates[-1]
        steps = round(1 / RATE_STEP)
        return tuple(round(steps * rate) / steps for rate in rates)

    def add(self, candidates: int, accepted: int | None) -> None:
        """Counts a node by its candidates and the rank that it accepted, if any."""
        decay = math.exp(-1 / ROUTE_MEMORY)
        for k in range(min(candidates, MAX_RANK)):
            self._accepted[k] = self._accepted[k] * decay + (k == accepted)
            self._verified[k] = self._verified[k] * decay + 1

    def reset(self) -> None:
        """Forgets the old draft's counts when a new draft is installed."""
        self._accepted = [0.0] * MAX_RANK
        self._verified = [0.0] * MAX_RANK
