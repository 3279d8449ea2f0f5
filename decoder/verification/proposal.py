"""What a drafter proposes to the verifier: tokens that may follow each sequence's last one.

Legend: B sequences, N candidates of a sequence at most, Q draft distributions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoder.verification.token_tree import Tree
from decoder.verification.tree_shape import chain_shape


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidates with the distributions of their draws. Shorter drafts are padded."""

    tokens_BN: Tensor
    # After temperature, top-k and top-p, for verification. Q = 0 where all sequences are greedy.
    probs_BQV: Tensor
    logits_BQV: list[Tensor]  # the draft's own, in pieces along Q, for signals
    drafted_B: Tensor  # candidates of each sequence; those behind are padding
    tree: Tree | None = None  # None: chains, each candidate drawn from its own distribution

    @property
    def candidates(self) -> int:
        return self.tokens_BN.shape[1]

    @classmethod
    def empty(
        cls, count: int, gamma: int, vocab_size: int, device: torch.device | str, greedy: bool
    ) -> "Proposal":
        """Padding of `gamma` tokens for each of `count` sequences."""
        piece_B1V = torch.zeros((count, 1, vocab_size), device=device)
        return cls(
            torch.zeros((count, gamma), dtype=torch.long, device=device),
            torch.zeros((count, 0 if greedy else gamma, vocab_size), device=device),
            [piece_B1V.clone() for _ in range(gamma)],
            torch.zeros(count, dtype=torch.long, device=device),
        )

    @classmethod
    def merge(
        cls,
        parts: "Sequence[tuple[list[int], Proposal]]",
        count: int,
        vocab_size: int,
        greedy: bool,
    ) -> "Proposal":
        """One proposal for `count` sequences, from those of disjoint groups of them.

        Sequences of no group draft nothing.
        """
        device = parts[0][1].tokens_BN.device
        candidates = max(part.candidates for _, part in parts)
        sources = max(sum(piece.shape[1] for piece in part.logits_BQV) for _, part in parts)
        logits_BQV = torch.zeros((count, sources, vocab_size), device=device)
        merged = cls(
            torch.zeros((count, candidates), dtype=torch.long, device=device),
            torch.zeros((count, 0 if greedy else sources, vocab_size), device=device),
            _split_sources(logits_BQV),
            torch.zeros(count, dtype=torch.long, device=device),
            _merge_trees(parts, count, candidates, device),
        )
        for members, part in parts:
            merged._write(members, part, logits_BQV)
        return merged

    def _write(self, members: list[int], part: "Proposal", logits_BQV: Tensor) -> None:
        """`logits_BQV` is the tensor whose pieces `self.logits_BQV` are."""
        self.tokens_BN[members, : part.candidates] = part.tokens_BN
        self.drafted_B[members] = part.drafted_B
        if part.logits_BQV:
            own_BQV = torch.cat(part.logits_BQV, 1)
            logits_BQV[members, : own_BQV.shape[1]] = own_BQV.to(logits_BQV.dtype)
        if sources := part.probs_BQV.shape[1]:
            self.probs_BQV[members, :sources] = part.probs_BQV.to(self.probs_BQV.dtype)

    def select(self, members: list[int]) -> "Proposal":
        """What verification needs of some of the sequences: everything but logits."""
        tree = None if self.tree is None else self.tree.select(members)
        return Proposal(
            self.tokens_BN[members], self.probs_BQV[members], [], self.drafted_B[members], tree
        )


def _merge_trees(
    parts: Sequence[tuple[list[int], Proposal]],
    count: int,
    candidates: int,
    device: torch.device | str,
) -> Tree | None:
    if all(part.tree is None for _, part in parts):
        return None
    trees = []
    for members, part in parts:
        tree = part.tree
        if tree is None:
            tree = Tree.of(chain_shape(part.candidates), len(members), False, device)
        trees.append((members, tree))
    return Tree.merge(trees, count, candidates, device)


def _split_sources(logits_BQV: Tensor) -> list[Tensor]:
    """[B, 1, V] views, one for each distribution."""
    return [logits_BQV[:, q : q + 1] for q in range(logits_BQV.shape[1])]
