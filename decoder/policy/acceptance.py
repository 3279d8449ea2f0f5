"""How much of a draft is accepted: running means by sequence, route and rank."""

import math

PRIOR_RATE = 0.7  # acceptance of a draft that nothing is known about: high enough to be tried
ROUTE_MEMORY = 2000.0  # compared positions that a route's mean remembers
SEQUENCE_MEMORY = 32.0
RANKS = 8  # candidates of a node whose acceptance is told apart
RANK_DECAY = (
    0.3  # how much less than its elder sibling a candidate is kept that nothing is known about
)
PRIOR_POSITIONS = 6.0  # positions of its own after which a sequence counts as much as its route


class Acceptance:
    """A running mean of Σ min(p, q) over compared positions, which forgets."""

    def __init__(self, memory: float, parent: "Acceptance | None" = None) -> None:
        self._memory, self.parent = memory, parent
        self._sum = self._count = 0.0

    @property
    def rate(self) -> float:
        prior = self.parent.rate if self.parent else PRIOR_RATE
        return (self._sum + prior * PRIOR_POSITIONS) / (self._count + PRIOR_POSITIONS)

    def add(self, overlap: float, compared: int) -> None:
        keep = math.exp(-compared / self._memory)
        self._sum, self._count = self._sum * keep + overlap, self._count * keep + compared
        if self.parent:
            self.parent.add(overlap, compared)

    def reset(self) -> None:
        """The draft has changed: what was seen says little about the new one."""
        self._sum = self._count = 0.0


class RankAcceptance:
    """How often a node keeps its k-th candidate, of the nodes that had one: what a tree's shape is chosen by."""

    def __init__(self, acceptance: Acceptance) -> None:
        self._first = acceptance  # first candidates are drafted in chains, too: what is known of them is the prior
        self._kept, self._met = [0.0] * RANKS, [0.0] * RANKS

    @property
    def rates(self) -> tuple[float, ...]:
        """In steps of 0.05: a shape is for many steps."""
        found: list[float] = []
        for kept, met in zip(self._kept, self._met, strict=True):
            prior = RANK_DECAY * found[-1] if found else self._first.rate
            found.append((kept + prior * PRIOR_POSITIONS) / (met + PRIOR_POSITIONS))
        return tuple(round(20 * rate) / 20 for rate in found)

    def add(self, met: int, kept: int | None) -> None:
        """A node had so many candidates; one of them was kept, or none."""
        keep = math.exp(-1 / ROUTE_MEMORY)
        for k in range(min(met, RANKS)):
            self._kept[k], self._met[k] = (
                self._kept[k] * keep + (k == kept),
                self._met[k] * keep + 1,
            )

    def reset(self) -> None:
        self._kept, self._met = [0.0] * RANKS, [0.0] * RANKS
