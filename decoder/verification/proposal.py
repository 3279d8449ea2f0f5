"""What a drafter proposes and a verifier walks: tokens that may follow a sequence's last one, as a tree.

Legend: B sequences, N candidates of a sequence at most, Q distributions that they were drawn from, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoder.models.kv_cache import TreePositions
from decoder.verification.tree_shape import TreeShape, chain_shape

CHOSEN = -1  # the source of a candidate that was not drawn


@dataclass(frozen=True, slots=True)
class Tree:
    """Whom each candidate follows, and what it was drawn from.

    Node 0 is the sequence's last token and node n + 1 its n-th candidate; a candidate's parent is a node before its own.
    Siblings are tried in their order. The first ones of a sequence are a tree of their own, however many.
    """

    parents_BN: Tensor  # a node
    sources_BN: Tensor  # one of the Q distributions, or CHOSEN: it is there for reasons that no dice had a part in
    distinct_B: Tensor  # whether siblings were drawn without replacement, each from what the ones before it left
    visible_BTT: Tensor  # which nodes a node may look at: its ancestors and itself
    depth: int  # of the deepest
    forks: bool  # False: every sequence's is a chain
    chains: list[
        bool
    ]  # by sequence: each candidate behind the one before. Not for what drawn tokens have to do with it

    @classmethod
    def of(cls, shape: TreeShape, rows: int, distinct: bool, device: torch.device | str) -> "Tree":
        """A shape's, the same in all sequences, each candidate from its parent's distribution."""
        place = {node: q for q, node in enumerate(shape.expanded)}
        sources_N = torch.tensor(
            [place[parent] for parent in shape.parents], dtype=torch.long, device=device
        )
        parents_N = torch.tensor(shape.parents, dtype=torch.long, device=device)
        return cls(
            parents_N.repeat(rows, 1),
            sources_N.repeat(rows, 1),
            torch.full((rows,), distinct, device=device),
            shape.visible.to(device).expand(rows, -1, -1),
            shape.depth,
            not shape.is_chain,
            [shape.is_chain] * rows,
        )

    @classmethod
    def blank(
        cls, rows: int, candidates: int, like: "Sequence[Tree]", device: torch.device | str
    ) -> "Tree":
        """For these trees to be put in; padding sees itself."""
        nothing_BN = torch.zeros((rows, candidates), dtype=torch.long, device=device)
        alone_TT = torch.eye(candidates + 1, dtype=torch.bool, device=device)
        visible_BTT = alone_TT.repeat(rows, 1, 1)
        depth, forks = max(tree.depth for tree in like), any(tree.forks for tree in like)
        distinct_B = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(
            nothing_BN, nothing_BN.clone(), distinct_B, visible_BTT, depth, forks, [False] * rows
        )

    def positions(self, behind: int) -> TreePositions | None:
        """Where a forward of all nodes stands that is fed so many tokens of the context before them, too; None: where
        any tokens would."""
        if not self.forks:
            return None
        (B, T, _), seen_BTT = self.visible_BTT.shape, self.visible_BTT
        if behind:
            whole_BCC = seen_BTT.new_ones((B, behind + T, behind + T)).tril()
            whole_BCC[:, behind:, behind:] = seen_BTT
            seen_BTT = whole_BCC
        return TreePositions(seen_BTT.sum(-1) - 1, seen_BTT)

    def select(self, rows: list[int]) -> "Tree":
        return replace(
            self,
            parents_BN=self.parents_BN[rows],
            sources_BN=self.sources_BN[rows],
            distinct_B=self.distinct_B[rows],
            visible_BTT=self.visible_BTT[rows],
            chains=[self.chains[row] for row in rows],
        )

    def write(self, members: list[int], part: "Tree") -> None:
        size = part.parents_BN.shape[1]
        self.parents_BN[members, :size], self.sources_BN[members, :size] = (
            part.parents_BN,
            part.sources_BN,
        )
        self.distinct_B[members] = part.distinct_B
        self.visible_BTT[members, : size + 1, : size + 1] = part.visible_BTT
        for member, is_chain in zip(members, part.chains, strict=True):
            self.chains[member] = is_chain


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens with the distributions they were drawn from. Sequences that drafted fewer are padded."""

    tokens_BN: Tensor
    probs_BQV: Tensor  # after temperature, top-k and top-p: what verification needs; Q = 0 where all sequences are greedy
    logits_BQV: list[Tensor]  # in pieces, as the draft gave them: what signals need
    drafted_B: Tensor
    tree: Tree | None = None  # None: a chain, each candidate drawn from its own distribution

    @property
    def candidates(self) -> int:
        return self.tokens_BN.shape[1]

    @classmethod
    def empty(
        cls, rows: int, gamma: int, vocab_size: int, device: torch.device | str, greedy: bool
    ) -> "Proposal":
        """Room for `gamma` tokens a sequence, with none drafted."""
        return cls(
            torch.zeros((rows, gamma), dtype=torch.long, device=device),
            torch.zeros((rows, 0 if greedy else gamma, vocab_size), device=device),
            [torch.zeros((rows, 1, vocab_size), device=device) for _ in range(gamma)],
            torch.zeros(rows, dtype=torch.long, device=device),
        )

    @classmethod
    def merge(
        cls, parts: "Sequence[tuple[list[int], Proposal]]", rows: int, vocab_size: int, greedy: bool
    ) -> "Proposal":
        """One for all sequences of what was proposed for some of them each; other sequences have drafted nothing."""
        device = parts[0][1].tokens_BN.device
        candidates = max(part.candidates for _, part in parts)
        sources = max(sum(piece.shape[1] for piece in part.logits_BQV) for _, part in parts)
        tokens_BN = torch.zeros((rows, candidates), dtype=torch.long, device=device)
        probs_BQV = torch.zeros((rows, 0 if greedy else sources, vocab_size), device=device)
        logits_BQV, drafted_B = (
            torch.zeros((rows, sources, vocab_size), device=device),
            torch.zeros_like(tokens_BN[:, 0]),
        )
        tree = None
        if any(part.tree is not None for _, part in parts):
            trees = [
                part.tree or Tree.of(chain_shape(part.candidates), len(m), False, device)
                for m, part in parts
            ]
            tree = Tree.blank(rows, candidates, trees, device)
            for (members, _), own in zip(parts, trees, strict=True):
                tree.write(members, own)
        for members, part in parts:
            tokens_BN[members, : part.candidates], drafted_B[members] = (
                part.tokens_BN,
                part.drafted_B,
            )
            if part.logits_BQV:
                said_BQV = torch.cat(part.logits_BQV, 1)
                logits_BQV[members, : said_BQV.shape[1]] = said_BQV.to(logits_BQV.dtype)
            if part.probs_BQV.shape[1]:
                probs_BQV[members, : part.probs_BQV.shape[1]] = part.probs_BQV.to(probs_BQV.dtype)
        return cls(tokens_BN, probs_BQV, _pieces(logits_BQV), drafted_B, tree)

    def as_chain(
        self, accepted_B: Tensor, path_BN: Tensor, logits_BTV: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The verified chain of every sequence: its tokens, its length, and the target's logits.

        Of a tree, the chain is the accepted path, continued by each node's first candidate.
        """
        tree = self.tree
        if tree is None:
            return self.tokens_BN, self.drafted_B, logits_BTV
        rows, candidates = self.tokens_BN.shape
        order_N = torch.arange(candidates, device=self.tokens_BN.device)
        real_BN = order_N < self.drafted_B[:, None]
        node_B, alive_B = (
            torch.zeros_like(self.drafted_B),
            torch.ones_like(self.drafted_B, dtype=torch.bool),
        )
        taken, length_B = [], torch.zeros_like(self.drafted_B)
        for depth in range(tree.depth):
            follows_BN = (tree.parents_BN == node_B[:, None]) & real_BN
            alive_B = alive_B & follows_BN.any(1)
            next_B = torch.where(
                depth < accepted_B,
                path_BN[:, min(depth, candidates - 1)],
                follows_BN.long().argmax(1),
            )
            taken.append(next_B)
            length_B += alive_B
            node_B = torch.where(alive_B, next_B + 1, node_B)
        taken_BG = torch.stack(taken, 1)
        nodes_BT = torch.nn.functional.pad(taken_BG + 1, (1, 0))
        row_B1 = torch.arange(rows, device=node_B.device)[:, None]
        return self.tokens_BN.gather(1, taken_BG), length_B, logits_BTV[row_B1, nodes_BT]


def _pieces(logits_BQV: Tensor) -> list[Tensor]:
    return [logits_BQV[:, q : q + 1] for q in range(logits_BQV.shape[1])]
