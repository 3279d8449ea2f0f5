"""Queries of every kind for `bench load`, the same for the same seed."""

import random
from collections.abc import Iterator, Sequence

from lab.rig import ROUTE
from online.messages import MAX_GAMMA, Query

LONG = 0.08  # share of prompts that run up to the context's limit
SHARED = 0.25  # share of prompts with a shared beginning
BEGINNINGS = 3
CANCELLED = 0.05
RECORDED = 0.7


class Mix:
    """Short, long and alike prompts; greedy and sampled; γ chosen, fixed and none."""

    def __init__(self, prompts: Sequence[list[int]], room: int, max_tokens: int, seed: int) -> None:
        self._prompts, self._room, self._max_tokens = prompts, room, max_tokens
        self._rng = random.Random(seed)
        self._beginnings = [self.concatenated(room // 4) for _ in range(BEGINNINGS)]

    def queries(self, count: int) -> Iterator[Query]:
        return map(self._query, range(count))

    def cancel_after(self) -> int | None:
        """Deltas after which a request is cancelled; mostly never."""
        return self._rng.choice([0, 0, 1, 4, 16]) if self._rng.random() < CANCELLED else None

    def concatenated(self, tokens: int) -> list[int]:
        """Prompts one after another, exactly so many tokens."""
        joined: list[int] = []
        while len(joined) < tokens:
            joined += self._rng.choice(self._prompts)
        return joined[:tokens]

    def _prompt(self) -> list[int]:
        kind = self._rng.random()
        if kind < LONG:
            shorter = self._rng.randint(self._room // 2, self._room)
            return self.concatenated(self._rng.choice([self._room, shorter]))
        beginning = self._rng.choice(self._beginnings) if kind < LONG + SHARED else []
        return (beginning + self._rng.choice(self._prompts))[: self._room]

    def _query(self, i: int) -> Query:
        choice = self._rng.choice
        return Query(
            str(i),
            ROUTE,
            tuple(self._prompt()),
            max_tokens=choice([self._max_tokens, self._rng.randint(1, self._max_tokens)]),
            temperature=choice([0.0, 0.7, 1.0]),
            top_p=choice([1.0, 0.9]),
            top_k=choice([0, 40]),
            seed=i,
            gamma=choice([None, None, None, 0, 1, 4, MAX_GAMMA]),
            ignore_eos=choice([True, False]),
            logprobs=choice([*[None] * 9, 5]),
            store=self._rng.random() < RECORDED,
        )
