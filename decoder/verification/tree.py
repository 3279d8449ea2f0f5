"""Verification of token trees, in torch's operations: the reference of the compiled one, and what runs on CUDA.

Recursive rejection (Multi-Candidate Speculative Decoding, arXiv 2401.06706): a node's candidates are tried one after
another. Candidate x, drawn from q, is kept with probability min(1, p(x) / q(x)); where it is not,

    p ← norm(max(0, p − q)),  and, where siblings are drawn without replacement,  q ← norm(q without x)

is what the next one meets, or else the target's own token. A candidate that was chosen, not drawn, counts as drawn from
a q that has all its mass on it; one that q could not give any more is not there. By induction over the candidates the
emitted token has the distribution p that the node began with, whatever the q are, as long as what they are does not
depend on the uniforms that decide here.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified nodes, Q distributions of the draft, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import CHOSEN, Tree
from decoder.verification.sampling import sample

Walked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # what a `Verdict` holds


class _Way:
    """Where the sequences stand while candidates are looked at in their order; children come after their parents."""

    def __init__(self, tree: Tree, drafted_B: Tensor) -> None:
        self._tree, self._drafted_B = tree, drafted_B
        self.row_B = torch.arange(len(drafted_B), device=drafted_B.device)
        self.node_B, self.accepted_B, self.compared_B = (
            torch.zeros_like(drafted_B) for _ in range(3)
        )
        self.path_BN = torch.zeros_like(tree.parents_BN)
        self._asked_B = drafted_B == -1  # whether a candidate of this node has been met

    def meet(self, n: int) -> tuple[Tensor, Tensor]:
        """Sequences that stand before candidate n, and those whose node's first candidate it is, if drawn by a draft."""
        meets_B = (self._tree.parents_BN[:, n] == self.node_B) & (n < self._drafted_B)
        first_B = meets_B & ~self._asked_B & (self._tree.sources_BN[:, n] != CHOSEN)
        self.compared_B += first_B
        self._asked_B = self._asked_B | meets_B
        return meets_B, first_B

    def keep(self, n: int, kept_B: Tensor) -> None:
        last_B1 = self.accepted_B.clamp(max=self.path_BN.shape[1] - 1)[:, None]
        self.path_BN.scatter_add_(1, last_B1, (n * kept_B)[:, None])
        self.accepted_B = self.accepted_B + kept_B
        self.node_B = torch.where(kept_B, n + 1, self.node_B)
        self._asked_B = self._asked_B & ~kept_B


def verify_tree_greedy(best_BT: Tensor, tokens_BN: Tensor, tree: Tree, drafted_B: Tensor) -> Walked:
    """`verify_tree` where all of the target's distributions have their mass on one token."""
    way, overlap_B = _Way(tree, drafted_B), torch.zeros_like(drafted_B)
    for n in range(tokens_BN.shape[1]):
        meets_B, first_B = way.meet(n)
        right_B = tokens_BN[:, n] == best_BT[way.row_B, way.node_B]
        overlap_B += right_B & first_B
        way.keep(n, right_B & meets_B)
    next_B = best_BT[way.row_B, way.node_B]
    return way.accepted_B, way.path_BN, next_B, torch.ones_like(next_B), overlap_B, way.compared_B


def verify_tree(
    target_probs_BTV: Tensor,
    draft_probs_BQV: Tensor,
    tokens_BN: Tensor,
    tree: Tree,
    drafted_B: Tensor,
    greedy_B: Tensor,
    accept_uniform_BN: Tensor,
    emit_uniform_B: Tensor,
    lenient: LenientAcceptance | None = None,
) -> Walked:
    """Accepts a path of each sequence's candidates and draws the token that follows it.

    Distributions are those after temperature, top-k and top-p; of greedy sequences every candidate counts as chosen.
    Candidates from `drafted_B[b]` on are padding. A lenient sequence keeps x with probability min(1, f(p(x)) / q(x)).
    """
    way, overlap_B = _Way(tree, drafted_B), torch.zeros_like(accept_uniform_BN[:, 0])
    p_BV = rest_BV = target_probs_BTV[:, 0]  # the node's own, and what rejections have left of it
    own_BV, drawn_B = (
        torch.empty_like(p_BV),
        drafted_B == -1,
    )  # what draws have left of q, where there were any
    for n in range(tokens_BN.shape[1]):
        meets_B, first_B = way.meet(n)
        token_B1, source_B = (
            tokens_BN[:, n : n + 1],
            torch.where(greedy_B, CHOSEN, tree.sources_BN[:, n]),
        )
        chosen_B = source_B == CHOSEN
        q_BV = torch.where(
            (drawn_B & tree.distinct_B)[:, None],
            own_BV,
            _drawn_from(draft_probs_BQV, source_B, p_BV),
        )
        q_BV = torch.where(
            chosen_B[:, None], torch.zeros_like(p_BV).scatter_(1, token_B1, 1.0), q_BV
        )
        left_BV = q_BV / q_BV.sum(-1, keepdim=True).clamp(min=torch.finfo(q_BV.dtype).tiny)
        rest_B, left_B = (x_BV.gather(1, token_B1).squeeze(1) for x_BV in (rest_BV, left_BV))
        tried_B = meets_B & (left_B > 0)
        bar_B = rest_B if lenient is None else lenient(rest_B[:, None]).squeeze(1)
        kept_B = tried_B & (accept_uniform_BN[:, n] * left_B < bar_B)
        overlap_B += first_B * torch.minimum(p_BV, q_BV).sum(-1)
        lost_B = tried_B & ~kept_B
        rest_BV = torch.where(lost_B[:, None], _without(rest_BV, left_BV), rest_BV)
        drawn_B = (drawn_B | (lost_B & ~chosen_B)) & ~kept_B
        own_BV = torch.where((lost_B & ~chosen_B)[:, None], q_BV.scatter(1, token_B1, 0.0), own_BV)
        way.keep(n, kept_B)
        p_BV = target_probs_BTV[way.row_B, way.node_B]
        rest_BV = torch.where(kept_B[:, None], p_BV, rest_BV)
    next_B = sample(rest_BV, emit_uniform_B)
    next_p_B = p_BV.gather(1, next_B[:, None]).squeeze(1)
    return way.accepted_B, way.path_BN, next_B, next_p_B, overlap_B, way.compared_B


def _drawn_from(draft_probs_BQV: Tensor, source_B: Tensor, like_BV: Tensor) -> Tensor:
    """The distributions that the sequences' candidates were drawn from; of chosen ones anything."""
    if draft_probs_BQV.shape[1] == 0:
        return like_BV
    row_B = torch.arange(len(source_B), device=source_B.device)
    return draft_probs_BQV[row_B, source_B.clamp(min=0)].to(like_BV.dtype)


def _without(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """norm(max(0, p − q)); p itself where nothing is left: then nothing is rejected but by rounding."""
    rest_BV = (p_BV - q_BV).clamp(min=0)
    mass_B1 = rest_BV.sum(-1, keepdim=True)
    return torch.where(mass_B1 > 0, rest_BV / mass_B1.clamp(min=torch.finfo(p_BV.dtype).tiny), p_BV)
