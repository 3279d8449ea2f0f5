"""Prefix reuse: a prefix that several contexts share is encoded once.

A new sequence copies the KV cache of the longest common prefix, from a live
sequence or from a finished one whose context was stored. Contexts are
shared within a route only: latency reveals whether a prompt was seen
before, and that must not leak to other routes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_PREFIX_TOKENS = 16  # a copy of fewer tokens costs what it saves


@dataclass(slots=True)
class CachedContext:
    """The content of a slot.

    It holds the target's KV cache of `tokens`, and the draft's of the first
    `draft_cached` tokens.
    """

    slot: int
    route: str
    tokens: Sequence[int]
    draft_cached: int = 0
    draft_version: int = 0


class PrefixCache:
    """Contexts of finished sequences, in slots of their own, evicted by last use."""

    def __init__(self, slots: range) -> None:
        self._free = list(slots)
        self._stored: list[CachedContext] = []  # least recently used first

    def find(
        self,
        route: str,
        tokens: Sequence[int],
        draft_version: int,
        live: Iterable[CachedContext],
    ) -> tuple[CachedContext, int] | None:
        """The context with the longest common prefix, and that prefix's length.

        Searches stored and `live` contexts. On a tie, takes the context
        with the most tokens encoded by the present draft version.
        """
        best = None
        best_score = MIN_PREFIX_TOKENS, -1
        for context in (*self._stored, *live):
            if context.route != route:
                continue
            length = common_prefix_length(context.tokens, tokens, best_score[0])
            if not length:
                continue
            reusable = context.draft_version == draft_version
            score = length, min(context.draft_cached, length) if reusable else 0
            if score > best_score:
                best, best_score = context, score
        if best is None:
            return None
        if best in self._stored:
            self._touch(best)
        return best, best_score[0]

    def store(self, finished: CachedContext) -> int | None:
        """Stores a finished sequence's context, and sets its slot.

        Returns the slot to copy it to. None if it is too short, or if a
        stored context contains it.
        """
        if len(finished.tokens) < MIN_PREFIX_TOKENS or not (self._free or self._stored):
            return None
        for stored in self._stored:
            if stored.route != finished.route:
                continue
            common = common_prefix_length(stored.tokens, finished.tokens, 1)
            if common == len(stored.tokens) and not _covers(stored, finished):
                # The conversation's next turn, or more of the draft's cache.
                return self._replace(stored, finished)
            if common == len(finished.tokens):
                self._touch(stored)
                return None
        if not self._free:
            return self._replace(self._stored[0], finished)
        finished.slot = self._free.pop()
        self._stored.append(finished)
        return finished.slot

    def clear(self) -> None:
        """Frees all slots."""
        self._free += [context.slot for context in self._stored]
        self._stored.clear()

    def _replace(self, stored: CachedContext, finished: CachedContext) -> int:
        self._stored.remove(stored)
        finished.slot = stored.slot
        self._stored.append(finished)
        return finished.slot

    def _touch(self, context: CachedContext) -> None:
        """Marks a context as the most recently used."""
        self._stored.remove(context)
        self._stored.append(context)


def _covers(stored: CachedContext, finished: CachedContext) -> bool:
    """Whether a stored context holds all that the finished one does."""
    return (
        len(stored.tokens) == len(finished.tokens)
        and stored.draft_version == finished.draft_version
        and stored.draft_cached >= finished.draft_cached
    )


def common_prefix_length(first: Sequence[int], second: Sequence[int], minimum: int) -> int:
    """Length of the common prefix; 0 if it is shorter than `minimum`."""
    high = min(len(first), len(second))
    if high < minimum or first[:minimum] != second[:minimum]:
        return 0
    low = minimum
    while low < high:  # the prefixes of length `low` are equal
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
