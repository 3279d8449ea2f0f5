"""The shapes of trees: whom each candidate follows, before anything is drafted.

Legend: N candidates, T = N + 1 nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

SHAPES = 256  # kept: acceptance goes on to suggest others
Span = slice | list[int]


def span(members: Sequence[int]) -> Span:
    """The same as a slice where the members are evenly spaced: that is a view of a tensor, and a list a copy."""
    step = members[1] - members[0] if len(members) > 1 else 1
    evenly = list(range(members[0], members[-1] + 1, step)) if step > 0 else []
    return slice(members[0], members[-1] + 1, step) if evenly == list(members) else list(members)


@dataclass(frozen=True)
class TreeLevel:
    """Nodes of one depth that have candidates."""

    depth: int
    first: int  # how many there are on the levels before
    nodes: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]  # of each

    @property
    def widest(self) -> int:
        return max(map(len, self.candidates))

    @cached_property
    def ranks(self) -> tuple[tuple[Span, Span], ...]:
        """By rank: which of the nodes have a candidate of it, and these."""
        found = []
        for k in range(self.widest):
            having = [w for w, own in enumerate(self.candidates) if len(own) > k]
            found.append((span(having), span([self.candidates[w][k] for w in having])))
        return tuple(found)


@dataclass(frozen=True)
class TreeShape:
    """Node 0 is a sequence's last token and node n + 1 its n-th candidate; `parents[n]` is the node that this one follows.

    Nodes are in the order of their depth, and siblings side by side: the first ones, however many, are a shape too.
    """

    parents: tuple[int, ...]

    @classmethod
    def of_widths(cls, widths: Sequence[int]) -> "TreeShape":
        """`widths[d]` candidates behind every node of depth d (arXiv 2401.06706, section 3.1)."""
        parents: list[int] = []
        level = [0]
        for width in widths:
            first = len(parents) + 1
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents) + 1))
        return cls(tuple(parents))

    @classmethod
    def best(cls, rates: Sequence[float], candidates: int, depth: int) -> "TreeShape":
        """The shape of so many candidates that emits most, where `rates[k]` is the share of nodes whose k-th candidate
        is kept, whatever the node: so a node is reached with the product of the rates on its way, and the best tree has
        those that are most likely reached (as in Sequoia, arXiv 2402.12374, section 3.1, without a bound to the width).
        """
        reached: list[
            tuple[float, int, int, int]
        ] = []  # of every node taken: how likely, depth, parent's place, rank
        edge = [(rate, 1, -1, rank) for rank, rate in enumerate(rates)]
        while edge and len(reached) < candidates:
            best = max(edge, key=lambda each: each[0])
            edge.remove(best)
            reached.append(best)
            likely, at, place = best[0], best[1], len(reached) - 1
            if at < depth:
                edge += [(likely * rate, at + 1, place, rank) for rank, rate in enumerate(rates)]
        return cls._in_order(reached)

    @classmethod
    def _in_order(cls, taken: list[tuple[float, int, int, int]]) -> "TreeShape":
        number = {-1: 0}  # of each node by its place
        parents: list[int] = []
        for depth in sorted({each[1] for each in taken}):
            level = [
                (number[parent], rank, place)
                for place, (_, at, parent, rank) in enumerate(taken)
                if at == depth
            ]
            for parent, _, place in sorted(level):
                parents.append(parent)
                number[place] = len(parents)
        return cls(tuple(parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """By node."""
        found = [0]
        for parent in self.parents:
            found.append(found[parent] + 1)
        return tuple(found)

    @cached_property
    def depth(self) -> int:
        return max(self.depths)

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    @cached_property
    def levels(self) -> "tuple[TreeLevel, ...]":
        """The nodes that have candidates, by depth."""
        found, first = [], 0
        for depth in range(self.depth):
            nodes = tuple(
                node for node, own in enumerate(self.children) if own and self.depths[node] == depth
            )
            found.append(
                TreeLevel(depth, first, nodes, tuple(self.children[node] for node in nodes))
            )
            first += len(nodes)
        return tuple(found)

    @cached_property
    def expanded(self) -> tuple[int, ...]:
        return tuple(node for level in self.levels for node in level.nodes)

    @cached_property
    def visible(self) -> Tensor:
        """Which nodes a node may look at, [T, T]: its ancestors and itself."""
        seen = torch.eye(len(self.parents) + 1, dtype=torch.bool)
        for n, parent in enumerate(self.parents):
            seen[n + 1] |= seen[parent]
        return seen

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The candidates behind each node."""
        found: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for n, parent in enumerate(self.parents):
            found[parent].append(n)
        return tuple(map(tuple, found))

    def met(self, path: Sequence[int]) -> list[tuple[int, int | None]]:
        """Of the nodes on the way of these candidates: how many candidates each has, and the rank of the one kept."""
        found: list[tuple[int, int | None]] = []
        node = 0
        for n in path:
            found.append((len(self.children[node]), self.children[node].index(n)))
            node = n + 1
        return [*found, (len(self.children[node]), None)]

    def first(self, candidates: int) -> "TreeShape":
        return self if candidates >= len(self.parents) else _first(self, candidates)


@lru_cache(SHAPES)
def _first(shape: TreeShape, candidates: int) -> TreeShape:
    return TreeShape(shape.parents[:candidates])


@cache
def chain_shape(gamma: int) -> TreeShape:
    return TreeShape(tuple(range(gamma)))


@lru_cache(SHAPES)
def best_shape(rates: tuple[float, ...], candidates: int, depth: int) -> TreeShape:
    return TreeShape.best(rates, candidates, depth)


@cache
def shape_of_widths(widths: tuple[int, ...]) -> TreeShape:
    return TreeShape.of_widths(widths)
