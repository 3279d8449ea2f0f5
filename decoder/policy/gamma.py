"""Speculation control: how many tokens a step drafts, from what steps cost and how much of a draft is accepted.

What is maximised is the tokens per second of the whole batch: Σ over rows of E[tokens | γ] ÷ seconds of a step with γ,
where a row with acceptance rate α emits (1 − α^(γ+1)) / (1 − α) tokens (Leviathan et al., arXiv 2211.17192, equation
1). γ = 0 is the plain step, with no draft work at all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decoder.policy.step_cost import Price, Prices

FIRST_GUESS = 0.7  # acceptance of a draft that nothing is known about: high enough to be tried
ROUTE_MEMORY = 2000.0  # compared positions that a route's mean remembers
ROW_MEMORY = 32.0
RANKS = 8  # candidates of a node whose acceptance is told apart
RANK_DECAY = 0.3  # how much less than its elder sibling a candidate is kept that nothing is known about
PRIOR_POSITIONS = 6.0  # positions of its own after which a row counts as much as its route
MARGIN = 1.05  # speculation must promise this much more than plain steps: it also pays for drafts' prompts
PROBE_SHARE = 0.005  # of the time that plain steps take, for looking whether drafting would pay again
GAMMA_LEARNS, ROWS_LEARN = 0.05, 0.02  # shares of a surprise that corrections take up
RECHECK_STEPS = 50  # drafting steps in a row after which one is plain: or what plain steps cost would be hearsay
RECHECK_LEARNS = 0.5  # share of that step's surprise that is taken up: there are few of them
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


class Ranks:
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
            self._kept[k], self._met[k] = self._kept[k] * keep + (k == kept), self._met[k] * keep + 1

    def forget(self) -> None:
        self._kept, self._met = [0.0] * RANKS, [0.0] * RANKS


class StepCosts:
    """Seconds of a step, by rows and γ: measured at start, corrected by every step since.

    log seconds = log measured at start + correction of this number of rows + correction of this γ. The first one moves
    slowly and for all γ, so that a γ that has not been tried lately follows what its neighbours show: longer contexts,
    a busier machine.
    """

    def __init__(self, max_gamma: int, slots: int) -> None:
        self.rows = [min(1 << i, slots) for i in range((slots - 1).bit_length() + 1)]  # numbers of rows told apart
        self._start = [[0.0] * (max_gamma + 1) for _ in self.rows]
        self._by_rows = [0.0] * len(self.rows)
        self._by_gamma = [[0.0] * (max_gamma + 1) for _ in self.rows]

    def measured(self, rows: int, seconds: Mapping[int, float]) -> None:
        """Seconds by γ, for some of them; in between they are interpolated."""
        gammas, i = sorted(seconds), self._bucket(rows)
        known = [seconds[gamma] for gamma in gammas]
        self._start[i] = np.log(np.interp(np.arange(len(self._start[i])), gammas, known)).tolist()
        self._by_rows[i], self._by_gamma[i] = 0.0, [0.0] * len(self._start[i])

    def seconds(self, rows: int) -> list[float]:
        """By γ, from 0 to the largest."""
        i = self._bucket(rows)
        by_rows = self._by_rows[i]
        return [math.exp(start + by_rows + own) for start, own in zip(self._start[i], self._by_gamma[i], strict=True)]

    def observe(self, rows: int, gamma: int, seconds: float, weight: float = GAMMA_LEARNS) -> None:
        i = self._bucket(rows)
        known = self._start[i][gamma] + self._by_rows[i] + self._by_gamma[i][gamma]
        surprise = max(-SURPRISE, min(SURPRISE, math.log(seconds) - known))
        self._by_rows[i] += ROWS_LEARN * surprise
        self._by_gamma[i][gamma] += weight * surprise

    def _bucket(self, rows: int) -> int:
        return (rows - 1).bit_length()


def expected_tokens(rates_B: Sequence[float], max_gamma: int) -> list[float]:
    """Σ over rows of the tokens that a step emits, by γ from 0 on.

    Plain numbers, here and in `StepCosts`: this runs before every step, and a dozen array operations would take 2 % of
    a small model's.
    """
    powers, total = [1.0] * len(rates_B), [float(len(rates_B))]
    for _ in range(max_gamma):
        powers = [power * rate for power, rate in zip(powers, rates_B, strict=True)]
        total.append(total[-1] + sum(powers))
    return total


@dataclass
class Control:
    """Chooses γ for a batch. A row whose request says its own γ keeps it."""

    costs: StepCosts
    max_gamma: int
    credit_s: float = 0.0  # time that probes may spend
    prices: Prices = field(default_factory=Prices)
    _drafted: int = 0  # steps since the last plain one

    def gamma(self, rates_B: Sequence[float], rows: int) -> int:
        """`rates_B` are the acceptance rates of the rows that leave γ to us; the others emit what they emit anyway."""
        if not rates_B:
            return 0
        seconds = self.costs.seconds(rows)
        tokens, others = expected_tokens(rates_B, self.max_gamma), rows - len(rates_B)
        speed = [(count + others) / cost for count, cost in zip(tokens, seconds, strict=True)]
        best = speed.index(max(speed))
        if speed[best] <= MARGIN * speed[0] or self.rechecks:
            return 0
        return best

    @property
    def rechecks(self) -> bool:
        """Whether the next step is to be a plain one, whatever drafts."""
        return self._drafted >= RECHECK_STEPS

    def price(self, rows: int) -> Price:
        """What drafting costs a step of so many rows."""
        return self.prices.of(rows)

    def stepped(
        self, rows: int, gamma: int | None, seconds: float, tokens: int, drafted: tuple[int, float] | None = None
    ) -> None:
        """`gamma` is what a chain of the draft's had; None: something else was drafted. `drafted`: the most candidates
        of a row, and the draft's forwards for them, where these are known."""
        self.prices.observe(rows, tokens, seconds / self.costs.seconds(rows)[0], drafted)
        if gamma is not None and gamma <= self.max_gamma:  # a request may ask for more
            rechecked = gamma == 0 and self.rechecks
            self.costs.observe(rows, gamma, seconds, RECHECK_LEARNS if rechecked else GAMMA_LEARNS)
        self._drafted = 0 if gamma == 0 else self._drafted + 1
        if gamma == 0:
            self.credit_s = min(self.credit_s + PROBE_SHARE * seconds, seconds)

    def spent(self, seconds: float) -> None:
        """A probe took this long."""
        self.credit_s -= seconds
