"""Prefix reuse: contexts that begin alike are encoded once.

A new sequence takes over the keys and values of the longest common beginning that a live sequence, or a finished one that was
kept, has in its slot. Contexts are shared within a route only: whether a prompt was seen before shows in its latency,
and that is nobody else's business.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_PREFIX_TOKENS = 16  # tokens; below this a copy costs what it saves


@dataclass(slots=True)
class CachedContext:
    """What a slot holds: the target's keys and values of `tokens`, the draft's of the first `draft_cached` of them."""

    slot: int
    route: str
    tokens: Sequence[int]
    draft_cached: int = 0
    draft_version: int = 0


class PrefixCache:
    """Contexts of finished sequences in slots of their own; the least recently used one makes room."""

    def __init__(self, slots: range) -> None:
        self._free = list(slots)
        self._kept: list[CachedContext] = []  # least recently used first

    def find(
        self, route: str, tokens: Sequence[int], draft_version: int, live: Iterable[CachedContext]
    ) -> tuple[CachedContext, int] | None:
        """The context that shares most of `tokens`' beginning, and how many tokens that is.

        Among equals the one of which the present draft has encoded most.
        """
        best, length, drafted = None, MIN_PREFIX_TOKENS, -1
        for context in (*self._kept, *live):
            if context.route != route or not (
                common := common_prefix_length(context.tokens, tokens, length)
            ):
                continue
            own = min(context.draft_cached, common) if context.draft_version == draft_version else 0
            if (common, own) > (length, drafted):
                best, length, drafted = context, common, own
        if best is None:
            return None
        if best in self._kept:
            self._touch(best)
        return best, length

    def store(self, finished: CachedContext) -> int | None:
        """A slot to copy a finished sequence's context to; None where nothing would be gained."""
        if len(finished.tokens) < MIN_PREFIX_TOKENS or not (self._free or self._kept):
            return None
        for kept in self._kept:
            if kept.route != finished.route:
                continue
            common = common_prefix_length(kept.tokens, finished.tokens, 1)
            if common == len(kept.tokens) and not _same(kept, finished):
                return self._replace(
                    kept, finished
                )  # a conversation that went on, or another draft's view of it
            if common == len(finished.tokens):
                self._touch(kept)
                return None
        if self._free:
            finished.slot = self._free.pop()
            self._kept.append(finished)
            return finished.slot
        return self._replace(self._kept[0], finished)

    def clear(self) -> None:
        self._free += [context.slot for context in self._kept]
        self._kept.clear()

    def _replace(self, kept: CachedContext, finished: CachedContext) -> int:
        self._kept.remove(kept)
        finished.slot = kept.slot
        self._kept.append(finished)
        return finished.slot

    def _touch(self, context: CachedContext) -> None:
        self._kept.remove(context)
        self._kept.append(context)


def _same(kept: CachedContext, finished: CachedContext) -> bool:
    drafts = (
        kept.draft_version == finished.draft_version and kept.draft_cached >= finished.draft_cached
    )
    return len(kept.tokens) == len(finished.tokens) and drafts


def common_prefix_length(one: Sequence[int], other: Sequence[int], at_least: int) -> int:
    """Length of the common beginning; 0 where it is shorter than `at_least`."""
    if len(one) < at_least or len(other) < at_least or one[:at_least] != other[:at_least]:
        return 0
    low, high = at_least, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
