"""Which way to draft is fastest: a bandit that is paid in tokens per second of whole steps.

What pays depends on the traffic, on the draft as it is now, on how busy the machine is: too much to be modelled, and
simple to try (BanditSpec, arXiv 2505.15141). One way is used for a stretch of steps, for to change costs: a draft has
to catch up on what others drafted without it. Then the way is used that may yet be the fastest: one stretch says little
of a way, for texts differ, so that those tried less have more in their favour (an upper confidence bound). Each has a
little of the time in any case, so that none is written off for good: traffic changes, and drafts are swapped.

What is best may be another for one sequence than for eight; but such situations are many, and each is short at first.
A way that is slow in one is most likely slow in one that is like it: so a situation begins with what the others say, as
log speed = the situation's own + the way's own, and comes to its own opinion with steps of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STRETCH = 16  # steps
FLOOR = 0.02  # share of the time that the ways have between them in any case, each the same
MEMORY = 40.0  # stretches that a way's speed in a situation remembers
SPREAD = 0.4  # how far a stretch's speed is from the mean, of one sequence
ELSEWHERE = 1.0  # own stretches that the opinion of a situation one apart is worth, at most
ROUNDS = 4  # of fitting situations and ways by turns
KEPT = (1 - 1 / MEMORY) ** (1 / STRETCH)  # by a step, of what was known
NOTHING = 1e-9


class Workload(NamedTuple):
    """What is best may differ by these."""

    route: str
    log2_batch_size: int
    greedy: bool

    @classmethod
    def of(cls, route: str, batch_size: int, greedy: bool) -> "Workload":
        return cls(route, (batch_size - 1).bit_length(), greedy)

    @property
    def spread(self) -> float:
        """The more sequences, the less one easy text does to a stretch (measured: docs/drafters.md)."""
        return SPREAD / math.sqrt(2**self.log2_batch_size)

    def worth(self, other: "Workload") -> float:
        """Own stretches that the opinion of another one of the same route is worth at most: the less, the farther."""
        if self == other:
            return math.inf
        apart = abs(self.log2_batch_size - other.log2_batch_size) + (self.greedy != other.greedy)
        return ELSEWHERE / apart**2


@dataclass(slots=True)
class Speed:
    """Of a way, in one situation."""

    tokens: float = 0.0
    seconds: float = 0.0
    stretches: float = 0.0

    @property
    def log(self) -> float:
        return math.log(self.tokens / self.seconds) if self.seconds else 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A step."""
        self.tokens, self.seconds = self.tokens * KEPT + tokens, self.seconds * KEPT + seconds
        self.stretches = self.stretches * KEPT + 1 / STRETCH


class Belief(NamedTuple):
    log_speed: float
    stretches: float  # that speak for it

    def promise(self, spread: float) -> float:
        """What it might be: the less is known of it, the more."""
        return (
            self.log_speed + math.log(1 + spread / math.sqrt(self.stretches))
            if self.stretches
            else math.inf
        )


def _best(beliefs: dict[str, Belief]) -> str:
    return max(beliefs, key=lambda way: beliefs[way].log_speed)


@dataclass
class Stretch:
    """Steps of one route: with what is best in their situations, or all with one way that is tried."""

    tried: str = ""
    best: dict[Workload, str] = field(
        default_factory=dict
    )  # as was believed when they first came up
    steps: int = 0
    seconds: float = 0.0


@dataclass
class DrafterBandit:
    ways: Sequence[str]
    # By route: speeds in its situations, the stretch under way, seconds that each way has had.
    _speeds: dict[str, dict[Workload, dict[str, Speed]]] = field(default_factory=dict)
    _stretches: dict[str, Stretch] = field(default_factory=dict)
    _seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    _now: tuple[Workload, str] | None = None

    def choose(self, situation: Workload) -> str:
        """For the next step."""
        speeds = self._speeds.setdefault(situation.route, {})
        if situation not in speeds:
            speeds[situation] = {way: Speed() for way in self.ways}
        stretch = self._stretches.get(situation.route)
        if stretch is None or stretch.steps >= STRETCH:
            self._stretches[situation.route] = stretch = self._begin(situation, stretch)
        if not stretch.tried and situation not in stretch.best:
            stretch.best[situation] = _best(self.beliefs(situation))
        self._now = situation, stretch.tried or stretch.best[situation]
        return self._now[1]

    def observe(self, tokens: int, seconds: float, before: float = 0.0) -> None:
        """The step that was chosen for has been taken; without a choice there is nothing to learn. `before`: seconds in
        which drafts were kept up with contexts. That is a part of what a way costs, but not of what it costs to try:
        there it is for what was drafted without them."""
        if self._now is not None:
            (situation, way), self._now = self._now, None
            stretch = self._stretches[situation.route]
            stretch.steps, stretch.seconds = stretch.steps + 1, stretch.seconds + seconds
            self._seconds[situation.route][way] += seconds
            self._speeds[situation.route][situation][way].add(
                tokens, seconds + (0.0 if stretch.tried else before)
            )

    def _begin(self, situation: Workload, last: Stretch | None) -> Stretch:
        spent = self._seconds.setdefault(situation.route, dict.fromkeys(self.ways, 0.0))
        least = min(self.ways, key=lambda way: spent[way])
        if last and spent[least] + last.seconds < FLOOR / len(self.ways) * sum(spent.values()):
            return Stretch(least)
        beliefs = self.beliefs(situation)
        chosen = max(self.ways, key=lambda way: beliefs[way].promise(situation.spread))
        known = beliefs[chosen].stretches > 0
        return (
            Stretch(best={situation: chosen})
            if known and chosen == _best(beliefs)
            else Stretch(chosen)
        )

    def beliefs(self, situation: Workload) -> dict[str, Belief]:
        """What a situation's own steps say, and those of situations that are like it."""
        known = self._speeds[situation.route]
        log_SW = np.array([[speed.log for speed in each.values()] for each in known.values()])
        count_SW = np.array(
            [[speed.stretches for speed in each.values()] for each in known.values()]
        )
        own = list(known).index(situation)
        weight_SW = np.minimum(count_SW, [[situation.worth(other)] for other in known])
        elsewhere_W = np.delete(weight_SW, own, 0).max(
            0, initial=0.0
        )  # they err alike: the nearest counts
        sums_W = count_SW[own] * log_SW[own] + elsewhere_W * _fitted(log_SW, weight_SW)[own]
        stretches_W = count_SW[own] + elsewhere_W
        told = zip(
            (sums_W / np.maximum(stretches_W, NOTHING)).tolist(), stretches_W.tolist(), strict=True
        )
        return dict(zip(self.ways, map(Belief._make, told), strict=True))


def _fitted(log_SW: Floats, weight_SW: Floats) -> Floats:
    """Log speeds as sums of a situation's and a way's: least squares, by turns."""
    of_S, of_W = np.maximum(weight_SW.sum(1), NOTHING), np.maximum(weight_SW.sum(0), NOTHING)
    way_W = np.zeros(log_SW.shape[1])
    for _ in range(ROUNDS):
        own_S1 = ((weight_SW * (log_SW - way_W)).sum(1) / of_S)[:, None]
        way_W = (weight_SW * (log_SW - own_S1)).sum(0) / of_W
    fitted_SW: Floats = own_S1 + way_W
    return fitted_SW
