"""The shapes of trees, before anything is drafted: the parent of each candidate.

Legend: N candidates, T = N + 1 nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from decoder.verification.tree_level import TreeLevel

SHAPES = 256  # cached shapes; acceptance keeps suggesting new ones


@dataclass(frozen=True)
class _Reached:
    """A node of a tree under construction."""

    probability: float  # of being accepted, with all its ancestors
    depth: int
    parent: int  # its index in the order of construction; -1: the root
    rank: int  # among its siblings

    def children(self, own: int, rates: Sequence[float]) -> "list[_Reached]":
        """The possible children of this node, whose index is `own`."""
        return [
            _Reached(self.probability * rate, self.depth + 1, own, rank)
            for rank, rate in enumerate(rates)
        ]


@dataclass(frozen=True)
class TreeShape:
    """Node 0 is the last token, node n + 1 is candidate n, `parents[n]` the node it follows.

    Nodes are ordered by depth, siblings side by side. The first candidates are a shape as well.
    """

    parents: tuple[int, ...]

    @classmethod
    def of_widths(cls, widths: Sequence[int]) -> "TreeShape":
        """`widths[d]` candidates for every node of depth d (arXiv 2401.06706, section 3.1)."""
        parents: list[int] = []
        level = [0]
        for width in widths:
            first = len(parents) + 1
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents) + 1))
        return cls(tuple(parents))

    @classmethod
    def best(cls, rates: Sequence[float], candidates: int, depth: int) -> "TreeShape":
        """The shape of at most `candidates` nodes that emits most tokens.

        `rates[k]` is the share of nodes whose k-th candidate is accepted, for every node alike. A
        node is reached with the product of the rates on its path, and the best tree consists of
        the nodes most likely reached (Sequoia, arXiv 2402.12374, section 3.1, without its limit
        on the width).
        """
        root = _Reached(1.0, 0, -1, 0)
        taken: list[_Reached] = []
        edge = root.children(-1, rates)
        while edge and len(taken) < candidates:
            best = max(edge, key=lambda node: node.probability)
            edge.remove(best)
            taken.append(best)
            if best.depth < depth:
                edge += best.children(len(taken) - 1, rates)
        return cls._in_order(taken)

    @classmethod
    def _in_order(cls, taken: list[_Reached]) -> "TreeShape":
        """Numbers the nodes by depth, then by parent, then by rank."""
        numbers = {-1: 0}  # by the order of construction
        parents: list[int] = []
        for depth in sorted({node.depth for node in taken}):
            level = [
                (numbers[node.parent], node.rank, index)
                for index, node in enumerate(taken)
                if node.depth == depth
            ]
            for parent, _, index in sorted(level):
                parents.append(parent)
                numbers[index] = len(parents)
        return cls(tuple(parents))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depth of each node."""
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
        """The nodes that have candidates, in order."""
        return tuple(node for level in self.levels for node in level.nodes)

    @cached_property
    def visible(self) -> Tensor:
        """Which nodes a node attends to, [T, T]: its ancestors and itself."""
        seen = torch.eye(len(self.parents) + 1, dtype=torch.bool)
        for n, parent in enumerate(self.parents):
            seen[n + 1] |= seen[parent]
        return seen

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The candidates of each node."""
        found: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for n, parent in enumerate(self.parents):
            found[parent].append(n)
        return tuple(map(tuple, found))

    def met(self, path: Sequence[int]) -> list[tuple[int, int | None]]:
        """For each node of an accepted path: its number of candidates, and the accepted rank.

        The last node has none accepted.
        """
        found: list[tuple[int, int | None]] = []
        node = 0
        for n in path:
            found.append((len(self.children[node]), self.children[node].index(n)))
            node = n + 1
        return [*found, (len(self.children[node]), None)]

    def first(self, candidates: int) -> "TreeShape":
        """The shape of the first candidates."""
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
