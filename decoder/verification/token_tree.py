"""Trees of candidates: the parent of each, and the distribution that it was drawn from.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 nodes, Q draft distributions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoder.models.kv_cache import TreePositions
from decoder.verification.tree_shape import TreeShape

CHOSEN = -1  # the source of a candidate that was not drawn


@dataclass(frozen=True, slots=True)
class Tree:
    """The candidates of a batch as trees.

    Node 0 is a sequence's last token and node n + 1 its candidate n. Parents come before children,
    and siblings are tried in order, so the first candidates of a tree are a tree as well.
    """

    parents_BN: Tensor  # a node
    # One of the Q distributions, or CHOSEN. A candidate may be chosen only for reasons that are
    # independent of all draws.
    sources_BN: Tensor
    distinct_B: Tensor  # whether siblings were drawn without replacement
    visible_BTT: Tensor  # which nodes a node attends to: its ancestors and itself
    depth: int  # of the deepest node
    forks: bool  # False: every sequence drafted a chain
    # By sequence: whether block verification applies, i.e. each candidate follows the one before.
    # Must not depend on drawn tokens.
    chains: list[bool]

    @classmethod
    def of(cls, shape: TreeShape, count: int, distinct: bool, device: torch.device | str) -> "Tree":
        """`count` sequences of one shape, each candidate from its parent's distribution."""
        order = {node: q for q, node in enumerate(shape.expanded)}
        sources = [order[parent] for parent in shape.parents]
        sources_N = torch.tensor(sources, dtype=torch.long, device=device)
        parents_N = torch.tensor(shape.parents, dtype=torch.long, device=device)
        return cls(
            parents_BN=parents_N.repeat(count, 1),
            sources_BN=sources_N.repeat(count, 1),
            distinct_B=torch.full((count,), distinct, device=device),
            visible_BTT=shape.visible.to(device).expand(count, -1, -1),
            depth=shape.depth,
            forks=not shape.is_chain,
            chains=[shape.is_chain] * count,
        )

    @classmethod
    def merge(
        cls,
        parts: "Sequence[tuple[list[int], Tree]]",
        count: int,
        candidates: int,
        device: torch.device | str,
    ) -> "Tree":
        """One tree tensor for `count` sequences, from the trees of disjoint groups of them."""
        trees = [tree for _, tree in parts]
        merged = cls._padding(count, candidates, trees, device)
        for members, tree in parts:
            merged._write(members, tree)
        return merged

    @classmethod
    def _padding(
        cls, count: int, candidates: int, trees: "Sequence[Tree]", device: torch.device | str
    ) -> "Tree":
        """Padding only, as deep as the deepest of `trees`. Padded nodes attend to themselves."""
        alone_TT = torch.eye(candidates + 1, dtype=torch.bool, device=device)
        zeros_BN = torch.zeros((count, candidates), dtype=torch.long, device=device)
        return cls(
            parents_BN=zeros_BN,
            sources_BN=zeros_BN.clone(),
            distinct_B=torch.zeros(count, dtype=torch.bool, device=device),
            visible_BTT=alone_TT.repeat(count, 1, 1),
            depth=max(tree.depth for tree in trees),
            forks=any(tree.forks for tree in trees),
            chains=[False] * count,
        )

    def _write(self, members: list[int], part: "Tree") -> None:
        size = part.parents_BN.shape[1]
        self.parents_BN[members, :size] = part.parents_BN
        self.sources_BN[members, :size] = part.sources_BN
        self.distinct_B[members] = part.distinct_B
        self.visible_BTT[members, : size + 1, : size + 1] = part.visible_BTT
        for member, is_chain in zip(members, part.chains, strict=True):
            self.chains[member] = is_chain

    def select(self, members: list[int]) -> "Tree":
        """The trees of some of the sequences."""
        return replace(
            self,
            parents_BN=self.parents_BN[members],
            sources_BN=self.sources_BN[members],
            distinct_B=self.distinct_B[members],
            visible_BTT=self.visible_BTT[members],
            chains=[self.chains[member] for member in members],
        )

    def positions(self, before: int) -> TreePositions | None:
        """The positions of all nodes in a forward that also feeds `before` context tokens.

        None for chains, whose tokens follow one another like any others.
        """
        if not self.forks:
            return None
        (B, T, _), visible_BTT = self.visible_BTT.shape, self.visible_BTT
        if before:
            whole_BCC = visible_BTT.new_ones((B, before + T, before + T)).tril()
            whole_BCC[:, before:, before:] = visible_BTT
            visible_BTT = whole_BCC
        return TreePositions(visible_BTT.sum(-1) - 1, visible_BTT)
