"""The hypotheses of one sequence's draft graph, and the tree that the graph unrolls to.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from decoder.device.transfer import upload
from decoder.verification.token_tree import Tree
from online.messages import MAX_GAMMA

SHARED = 2  # hypotheses that end in this many equal tokens share their continuation
BEAM = 2  # hypotheses of a depth that are extended: the likeliest


@dataclass(slots=True)
class Hypothesis:
    """A drafted token behind its ancestors. The root is the sequence's last token."""

    parent: "Hypothesis | None"
    token: int
    likelihood: float = 1.0  # of the token and its ancestors, by the draft
    source: int = -1  # draft distribution that the token was drawn from
    # Where the draft's cache has its ancestors and itself; empty: it was not encoded.
    cells: tuple[int, ...] = ()
    children: "list[Hypothesis]" = field(default_factory=list)
    shares_with: "Hypothesis | None" = None  # the one whose children continue this one, too

    @property
    def last_tokens(self) -> tuple[int, ...]:
        tokens: list[int] = []
        at: Hypothesis | None = self
        while at is not None and len(tokens) < SHARED:
            tokens.append(at.token)
            at = at.parent
        return tuple(tokens)


Node = tuple[Hypothesis, int]  # of the unrolled tree: a hypothesis and the number of its parent


class Graph:
    """One sequence's hypotheses."""

    def __init__(self, last_token: int, greedy: bool) -> None:
        self.root = Hypothesis(None, last_token)
        self.frontier = [self.root]  # hypotheses to extend next
        self.extended = 0  # hypotheses that have children
        self._greedy = greedy
        self._by_last_tokens: dict[tuple[int, ...], Hypothesis] = {}  # extended ones

    def extend(
        self, tokens: Sequence[int], probs: Sequence[float], first: int, width: int, limit: int
    ) -> None:
        """Adds `width` children to each hypothesis of the frontier, then chooses the next frontier.

        Args:
            tokens: drawn tokens of the frontier's hypotheses, `width` each.
            probs: the draft's probability of each token.
            first: number of the first hypothesis' distribution.
            limit: hypotheses that may be extended in all.
        """
        level: list[Hypothesis] = []
        for w, node in enumerate(self.frontier):
            for k in range(width * w, width * (w + 1)):
                child = Hypothesis(node, tokens[k], node.likelihood * probs[k], first + w)
                node.children.append(child)
                level.append(child)
        self.extended += len(self.frontier)
        # Sampled sequences share within a depth only: see the proof in `graph`.
        if not self._greedy:
            self._by_last_tokens.clear()
        self.frontier = self._next_frontier(level, min(BEAM, limit - self.extended))

    def _next_frontier(self, level: list[Hypothesis], beam: int) -> list[Hypothesis]:
        frontier: list[Hypothesis] = []
        for hypothesis in sorted(level, key=lambda each: -each.likelihood):
            last_tokens = hypothesis.last_tokens
            hypothesis.shares_with = self._by_last_tokens.get(last_tokens)
            if hypothesis.shares_with is None and len(frontier) < beam:
                self._by_last_tokens[last_tokens] = hypothesis
                frontier.append(hypothesis)
        return frontier

    def unrolled(self, candidates: int) -> list[Node]:
        """The graph as a tree of at most so many nodes, level by level. Node 0 is the root."""
        nodes: list[Node] = []
        level = [(0, self.root)]
        for _ in range(MAX_GAMMA):
            below = []
            for number, hypothesis in level:
                for child in (hypothesis.shares_with or hypothesis).children:
                    if len(nodes) == candidates:
                        return nodes
                    nodes.append((child, number))
                    below.append((len(nodes), child))
            level = below
        return nodes


def cached_cells(nodes: Iterable[Node]) -> dict[int, int]:
    """By candidate, its cell in the draft's cache.

    A candidate that stands behind another hypothesis' children has no cell: its keys were computed
    for other ancestors.
    """
    cells: dict[int, int] = {}
    path: dict[int, tuple[int, ...]] = {0: ()}
    for n, (hypothesis, parent) in enumerate(nodes):
        if hypothesis.cells and path.get(parent) == hypothesis.cells[:-1]:
            cells[n] = hypothesis.cells[-1]
            path[n + 1] = hypothesis.cells
    return cells


def tree_of(unrolled: Sequence[Sequence[Node]], device: torch.device | str) -> Tree:
    """The sequences' unrolled graphs as one padded tree for verification."""
    count, most = len(unrolled), max(map(len, unrolled))
    parents_BN = np.zeros((count, most), np.int64)
    sources_BN = np.zeros((count, most), np.int64)
    visible_BTT = np.repeat(np.eye(most + 1, dtype=np.bool_)[None], count, 0)
    for b, nodes in enumerate(unrolled):
        for n, (hypothesis, parent) in enumerate(nodes):
            parents_BN[b, n] = parent
            sources_BN[b, n] = hypothesis.source
            visible_BTT[b, n + 1] |= visible_BTT[b, parent]
    return Tree(
        upload(parents_BN, device),
        upload(sources_BN, device),
        torch.ones(count, dtype=torch.bool, device=device),
        upload(visible_BTT, device),
        int(visible_BTT.sum(-1).max()) - 1,
        True,
        [False] * count,
    )
