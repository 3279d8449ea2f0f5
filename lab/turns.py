"""What contestants do that answer the same queries by turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lab.rig import Answer
from lab.statistics import median_ratio

A_SEQUENCE = 4  # queries of a turn, where several are answered at once


def in_turn(queries: int, at_once: int) -> int:
    """How many are asked. Where drafts are kept, answers end one after another, and all at once where nothing is
    drafted: a turn of as many queries as sequences would mostly compare ends, with fewer and fewer sequences."""
    return max(queries, A_SEQUENCE * at_once) if at_once > 1 else queries


@dataclass(kw_only=True)
class Turns:
    """One contestant's, so far."""

    speeds: list[float] = field(default_factory=list)  # tokens per second, turn by turn
    tokens: int = 0
    steps: int = 0
    drafted: int = 0

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        """Another turn."""
        tokens = sum(len(answer.ids) for answer in answers)
        self.speeds.append(tokens / seconds)
        self.tokens += tokens
        self.steps += sum(answer.stats.steps for answer in answers)
        self.drafted += sum(answer.stats.drafted for answer in answers)

    def over(self, other: "Turns") -> list[float]:
        """Median of the ratios turn by turn, and its 95 % interval: [value, low, high]."""
        ratio = median_ratio(np.array(self.speeds) / np.array(other.speeds))
        return [ratio.value, ratio.low, ratio.high]

    def told(self, chain: "Turns", plain: "Turns") -> dict[str, float | list[float]]:
        """A drafter's row: τ, tokens verified for one emitted, and tokens per second over the chain and over none."""
        return {
            "tau": self.tokens / self.steps,
            "verified_per_token": (self.drafted + self.steps) / self.tokens,
            "tokens_per_s_vs_chain": self.over(chain),
            "tokens_per_s_vs_plain": self.over(plain),
        }
