"""Variants of decoding, timed in interleaved rounds on the same queries.

A shared machine is faster or slower for minutes at a time. Within a round every variant answers the
same queries, one after another, so that ratios of one round compare equal conditions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lab.rig import ROUTE
from lab.statistics import Estimate, median_ratio
from lab.streams import Stream
from online.messages import DrafterName

PER_SEQUENCE = 4  # queries of a round for each sequence in flight, at least
TRIAL_ROUNDS = 3  # one trial alone prefers a γ by luck of its queries


@dataclass(kw_only=True)
class Variant:
    """A drafter with its γ, and what it did in the rounds so far."""

    drafter: DrafterName = "chain"
    gamma: int | None = None  # drafted tokens a step; None: the engine's choice before every step
    route: str = ROUTE
    speeds: list[float] = field(default_factory=list)  # tokens per second of each round
    requests: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0

    def add(self, answers: Sequence[Stream], seconds: float) -> None:
        """Adds a round."""
        tokens = sum(len(answer.ids) for answer in answers)
        self.speeds.append(tokens / seconds)
        self.requests += len(answers)
        self.tokens += tokens
        self.steps += sum(answer.stats.steps for answer in answers)
        self.drafted += sum(answer.stats.drafted for answer in answers)

    def speed_over(self, other: "Variant") -> Estimate:
        """Tokens per second relative to the other variant, round by round."""
        ratios = zip(self.speeds, other.speeds, strict=True)
        return median_ratio([own / theirs for own, theirs in ratios])

    def figures(self, chain: "Variant", plain: "Variant") -> dict[str, float | list[float]]:
        """τ, verified tokens for each emitted token, speeds relative to chain and plain."""
        return {
            "tau": self.tokens / self.steps,
            "verified_per_token": (self.drafted + self.steps) / self.tokens,
            "tokens_per_s_vs_chain": self.speed_over(chain).figures,
            "tokens_per_s_vs_plain": self.speed_over(plain).figures,
        }


Q = TypeVar("Q")
V = TypeVar("V", bound=Variant)


def round_size(queries: int, at_once: int) -> int:
    """Queries of a round.

    Several sequences end at different times. A short round would mostly time its end, when fewer
    and fewer sequences run.
    """
    return max(queries, PER_SEQUENCE * at_once) if at_once > 1 else queries


def queries_of(queries: Sequence[Q], count: int, number: int) -> list[Q]:
    """The queries of round `number`: the next `count`, from the start again after the last."""
    return [queries[(number * count + i) % len(queries)] for i in range(count)]


def interleave(
    variants: Sequence[V],
    queries: Sequence[Q],
    count: int,
    at_once: int,
    rounds: int,
    run: Callable[[V, Sequence[Q], int], None],
) -> None:
    """Runs all variants in every round, in alternating order."""
    for number in range(rounds):
        for variant in variants if number % 2 else variants[::-1]:
            run(variant, queries_of(queries, count, number), at_once)


def at_best_gamma(
    gammas: Sequence[int | None],
    queries: Sequence[Q],
    count: int,
    at_once: int,
    run: Callable[[Variant, Sequence[Q], int], None],
    **fields: Any,
) -> Variant:
    """A variant with the γ that decodes fastest in a few short rounds, which it does not keep."""
    tried = [Variant(gamma=gamma, **fields) for gamma in gammas]
    interleave(tried, queries, max(1, count // 2), at_once, TRIAL_ROUNDS, run)
    best = max(tried, key=lambda variant: sum(variant.speeds))
    return Variant(gamma=best.gamma, **fields)


def mixed(queries: Sequence[Q]) -> list[Q]:
    """The first half (sampled) and the second half (greedy) of `queries`, alternating."""
    half = len(queries) // 2
    return [each for pair in zip(queries[:half], queries[half:], strict=True) for each in pair]
