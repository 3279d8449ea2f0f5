"""Every possible draft of a small tree, as one batch: the input of `lab/enumeration.py`.

Two models are tables of logits over three tokens. A case has one sequence for each assignment of
tokens to a tree's candidates, with the probability that a drafter proposes it.

Legend: B sequences, N candidates, T = N + 1 nodes, Q draft distributions, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.token_tree import CHOSEN, Tree
from decoder.verification.tree_shape import TreeShape

Setting = tuple[float, int, float]  # temperature, top-k, top-p
Shape = tuple[int, ...]  # the parent of each candidate
Tokens = tuple[int, ...]  # the token of each candidate

V = 3
# A seed with which most rejections leave two tokens: with one, nothing could be drawn wrongly.
SEED = 304
TARGET, DRAFT = 0, 1
SHAPES: dict[str, Shape] = {
    "chain": (0, 1, 2),
    "three at the root": (0, 0, 0),
    "two, then one each": (0, 0, 1, 2),
    "two, then two": (0, 0, 1, 1, 2),
    "siblings after a grandchild": (0, 1, 0, 2, 2),
    "wide below": (0, 1, 1, 1),
}

# How a tree is drafted.
WITH_REPLACEMENT, WITHOUT_REPLACEMENT = "with replacement", "without replacement"
CHOSEN_TREE, FIRST_SIBLING_CHOSEN = "chosen", "first sibling chosen"
TREE_MODES = [WITH_REPLACEMENT, WITHOUT_REPLACEMENT, CHOSEN_TREE, FIRST_SIBLING_CHOSEN]

# How a chain is drafted that block verification verifies.
DRAWN_CHAIN, CHOSEN_CHAIN = "drawn chain", "chosen chain"
# One token is chosen, the others are drawn. The chain is a token shorter after some of its tokens.
FIRST_CHOSEN, LAST_CHOSEN = "first token chosen", "last token chosen"
CHAIN_MODES = [DRAWN_CHAIN, CHOSEN_CHAIN, FIRST_CHOSEN, LAST_CHOSEN]


def logits(model: int, tokens: list[int], dtype: torch.dtype) -> Tensor:
    """The logits of a model after some tokens, [V]: fixed random numbers."""
    drawn = np.random.default_rng([model, SEED, *tokens]).normal(0, 1.5, V)
    return torch.from_numpy(drawn).to(dtype)


def path_to(shape: Shape, node: int) -> list[int]:
    """The nodes from below the root to this one."""
    return [] if node == 0 else [*path_to(shape, shape[node - 1]), node]


def tree_logits(
    model: int, shape: Shape, assignments: Sequence[Tokens], dtype: torch.dtype
) -> Tensor:
    """The logits of a model after every node of every assignment, [B, T, V]."""
    found = []
    for tokens in assignments:
        for node in range(len(shape) + 1):
            path = [tokens[n - 1] for n in path_to(shape, node)]
            found.append(logits(model, path, dtype))
    return torch.stack(found).view(len(assignments), len(shape) + 1, V)


def same_sampling(setting: Setting, count: int) -> Sampling:
    temperature, top_k, top_p = setting
    return Sampling.of([temperature] * count, [top_k] * count, [top_p] * count, V)


@dataclass(frozen=True)
class Case:
    """All assignments of tokens to a shape's candidates, proposed in one mode."""

    shape: Shape
    assignments: Sequence[Tokens]
    setting: Setting
    logits_BTV: Tensor  # the target's
    proposal: Proposal
    probability_B: Tensor  # that a drafter proposes the assignment

    @classmethod
    def of(cls, shape: Shape, mode: str, setting: Setting, dtype: torch.dtype) -> "Case":
        """`mode` is one of TREE_MODES, or for a chain one of CHAIN_MODES."""
        assignments = list(itertools.product(range(V), repeat=len(shape)))
        draft_logits_BTV = tree_logits(DRAFT, shape, assignments, dtype)
        draft_probs_BTV = probabilities(draft_logits_BTV, same_sampling(setting, len(assignments)))
        probability_B = torch.tensor(
            [
                _probability(shape, tokens, draft_probs_BTV[b], mode)
                for b, tokens in enumerate(assignments)
            ],
            dtype=torch.float64,
        )
        proposal = _proposal(shape, assignments, draft_probs_BTV, mode)
        target_logits_BTV = tree_logits(TARGET, shape, assignments, dtype)
        return cls(shape, assignments, setting, target_logits_BTV, proposal, probability_B)

    @property
    def is_block(self) -> bool:
        """Whether block verification applies."""
        tree = self.proposal.tree
        return tree is None or tree.chains[0]

    @property
    def sampling(self) -> Sampling:
        return same_sampling(self.setting, len(self.assignments))

    @property
    def depth(self) -> int:
        return max(len(path_to(self.shape, node)) for node in range(len(self.shape) + 1))


def _proposal(
    shape: Shape, assignments: Sequence[Tokens], draft_probs_BTV: Tensor, mode: str
) -> Proposal:
    count = len(assignments)
    drafted_B = torch.tensor([len(shape) - _ends_early(tokens, mode) for tokens in assignments])
    tokens_BN = torch.tensor(assignments)
    if mode == DRAWN_CHAIN:
        return Proposal(tokens_BN, draft_probs_BTV[:, : len(shape)], [], drafted_B)
    tree = replace(
        Tree.of(TreeShape(shape), count, mode != WITH_REPLACEMENT, "cpu"),
        sources_BN=torch.tensor([_sources(shape, mode)] * count),
        chains=[mode in CHAIN_MODES] * count,
    )
    return Proposal(tokens_BN, draft_probs_BTV, [], drafted_B, tree)


def _sources(shape: Shape, mode: str) -> list[int]:
    """By candidate: its parent, whose draft distribution it is drawn from, or CHOSEN."""
    last = len(shape) - 1
    found = []
    for n, parent in enumerate(shape):
        is_chosen = (
            mode in (CHOSEN_TREE, CHOSEN_CHAIN)
            or (mode == FIRST_SIBLING_CHOSEN and n == shape.index(parent))
            or (mode == FIRST_CHOSEN and n == 0)
            or (mode == LAST_CHOSEN and n == last)
        )
        found.append(CHOSEN if is_chosen else parent)
    return found


def _ends_early(tokens: Tokens, mode: str) -> bool:
    """Whether the chain's last token is padding: decided by the tokens before it."""
    return mode in (FIRST_CHOSEN, LAST_CHOSEN) and sum(tokens[:-1]) % V == 0


def _probability(shape: Shape, tokens: Tokens, draft_probs_TV: Tensor, mode: str) -> float:
    """The probability that a drafter proposes these tokens."""
    found, sources = 1.0, _sources(shape, mode)
    for n, parent in enumerate(shape):
        q_V = draft_probs_TV[parent].double().clone()
        if n == len(shape) - 1 and _ends_early(tokens, mode):
            found *= tokens[n] == 0  # padding
        elif sources[n] == CHOSEN:
            # The draft's least likely token, moved on by n: different from most drawn ones.
            found *= tokens[n] == (int(q_V.argmin()) + n) % V
        else:
            if mode != WITH_REPLACEMENT:
                for m in range(n):
                    if shape[m] == parent and sources[m] != CHOSEN:
                        q_V[tokens[m]] = 0
            mass = float(q_V.sum())
            # A drafter with nothing left to draw may propose anything: here the first token.
            found *= float(q_V[tokens[n]]) / mass if mass > 0 else tokens[n] == 0
    return found
