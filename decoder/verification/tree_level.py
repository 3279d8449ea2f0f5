"""One level of a tree's shape, and indices that select parts of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Span = slice | list[int]


def span(members: Sequence[int]) -> Span:
    """The same indices, as a slice where they are evenly spaced: it yields a view, not a copy."""
    step = members[1] - members[0] if len(members) > 1 else 1
    evenly = list(range(members[0], members[-1] + 1, step)) if step > 0 else []
    if evenly == list(members):
        return slice(members[0], members[-1] + 1, step)
    return list(members)


@dataclass(frozen=True)
class TreeLevel:
    """The nodes of one depth that have candidates."""

    depth: int
    first: int  # number of such nodes on the levels above
    nodes: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]  # of each node

    @property
    def widest(self) -> int:
        return max(map(len, self.candidates))

    @cached_property
    def ranks(self) -> tuple[tuple[Span, Span], ...]:
        """By rank k: the indices of the nodes that have a k-th candidate, and these candidates."""
        found = []
        for k in range(self.widest):
            having = [w for w, own in enumerate(self.candidates) if len(own) > k]
            found.append((span(having), span([self.candidates[w][k] for w in having])))
        return tuple(found)
