"""Verification of token trees in torch's operations: the compiled one's reference, and CUDA's.

Recursive rejection (Multi-Candidate Speculative Decoding, arXiv 2401.06706) tries the candidates
of a node in order. It accepts candidate x, drawn from q, with probability min(1, p(x) / q(x)).
After a rejection the next candidate, or else the emitted token, faces

    p ← norm(max(0, p − q)),  and, for siblings drawn without replacement,  q ← norm(q without x)

A chosen candidate counts as drawn from a one-hot q. A candidate that q can no longer give does not
exist. By induction over the candidates, the emitted token has the node's own distribution p, for
any q that does not depend on the uniforms used here.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified positions,
Q draft distributions, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Uniforms, sample
from decoder.verification.token_tree import CHOSEN, Tree


def verify_tree_greedy(best_BT: Tensor, proposal: Proposal, tree: Tree) -> Verification:
    """`verify_tree` where the target's distributions are one-hot, on its tokens `best_BT`."""
    path = _Path(tree, proposal.drafted_B)
    overlap_B = torch.zeros_like(proposal.drafted_B)
    for n in range(proposal.candidates):
        reached_B, compared_B = path.reach(n)
        right_B = proposal.tokens_BN[:, n] == best_BT[path.row_B, path.node_B]
        overlap_B += right_B & compared_B
        path.accept(n, right_B & reached_B)
    next_B = best_BT[path.row_B, path.node_B]
    return path.result(next_B, torch.ones_like(next_B), overlap_B)


def verify_tree(
    target_probs_BTV: Tensor,
    proposal: Proposal,
    tree: Tree,
    greedy_B: Tensor,
    uniforms: Uniforms,
    lenient: LenientAcceptance | None = None,
) -> Verification:
    """Accepts a path of each sequence's candidates and samples the token that follows it.

    Distributions are those after temperature, top-k and top-p. All candidates of a greedy sequence
    count as chosen. A lenient sequence accepts x with probability min(1, f(p(x)) / q(x)).
    """
    path = _Path(tree, proposal.drafted_B)
    node = _Node(target_probs_BTV[:, 0], tree.distinct_B)
    overlap_B = torch.zeros_like(uniforms.emit_B)
    for n in range(proposal.candidates):
        reached_B, compared_B = path.reach(n)
        token_B1 = proposal.tokens_BN[:, n : n + 1]
        source_B = torch.where(greedy_B, CHOSEN, tree.sources_BN[:, n])
        q_BV = node.draft_probs(proposal.probs_BQV, source_B, token_B1)
        overlap_B += compared_B * torch.minimum(node.target_BV, q_BV).sum(-1)
        normed_BV = q_BV / q_BV.sum(-1, keepdim=True).clamp(min=torch.finfo(q_BV.dtype).tiny)
        p_B = node.residual_BV.gather(1, token_B1).squeeze(1)
        q_B = normed_BV.gather(1, token_B1).squeeze(1)
        exists_B = reached_B & (q_B > 0)
        due_B = p_B if lenient is None else lenient(p_B[:, None]).squeeze(1)
        accepted_B = exists_B & (uniforms.accept_BN[:, n] * q_B < due_B)
        node.reject(exists_B & ~accepted_B, normed_BV)
        node.remove(exists_B & ~accepted_B & (source_B != CHOSEN), q_BV, token_B1)
        path.accept(n, accepted_B)
        node.enter(accepted_B, target_probs_BTV[path.row_B, path.node_B])
    next_B = sample(node.residual_BV, uniforms.emit_B)
    next_p_B = node.target_BV.gather(1, next_B[:, None]).squeeze(1)
    return path.result(next_B, next_p_B, overlap_B)


class _Path:
    """Each sequence's path through its tree, while candidates are tried in order.

    The order is that of their indices: children come after their parents.
    """

    def __init__(self, tree: Tree, drafted_B: Tensor) -> None:
        self._tree, self._drafted_B = tree, drafted_B
        self.row_B = torch.arange(len(drafted_B), device=drafted_B.device)
        self.node_B = torch.zeros_like(drafted_B)  # the last node of the path
        self._accepted_B = torch.zeros_like(drafted_B)
        self._compared_B = torch.zeros_like(drafted_B)
        self._path_BN = torch.zeros_like(tree.parents_BN)
        self._tried_B = torch.zeros_like(drafted_B, dtype=torch.bool)  # a candidate of the node was

    def reach(self, n: int) -> tuple[Tensor, Tensor]:
        """Which sequences try candidate n, and for which it is the node's first, and drawn."""
        reached_B = (self._tree.parents_BN[:, n] == self.node_B) & (n < self._drafted_B)
        first_B = reached_B & ~self._tried_B & (self._tree.sources_BN[:, n] != CHOSEN)
        self._compared_B += first_B
        self._tried_B = self._tried_B | reached_B
        return reached_B, first_B

    def accept(self, n: int, accepted_B: Tensor) -> None:
        last_B1 = self._accepted_B.clamp(max=self._path_BN.shape[1] - 1)[:, None]
        self._path_BN.scatter_add_(1, last_B1, (n * accepted_B)[:, None])
        self._accepted_B = self._accepted_B + accepted_B
        self.node_B = torch.where(accepted_B, n + 1, self.node_B)
        self._tried_B = self._tried_B & ~accepted_B

    def result(self, next_B: Tensor, next_p_B: Tensor, overlap_B: Tensor) -> Verification:
        return Verification(
            self._accepted_B, self._path_BN, next_B, next_p_B, overlap_B, self._compared_B
        )


class _Node:
    """The distributions at each sequence's current node, after the rejections there."""

    def __init__(self, target_BV: Tensor, distinct_B: Tensor) -> None:
        self.target_BV = self.residual_BV = target_BV
        self._distinct_B = distinct_B
        self._remaining_BV = torch.empty_like(target_BV)  # q without the siblings drawn before
        self._removed_B = torch.zeros_like(distinct_B)  # whether q has lost a sibling

    def draft_probs(self, probs_BQV: Tensor, source_B: Tensor, token_B1: Tensor) -> Tensor:
        """The distribution of a candidate's draw, [B, V], not yet normalised."""
        chosen_B1 = (source_B == CHOSEN)[:, None]
        one_hot_BV = torch.zeros_like(self.target_BV).scatter_(1, token_B1, 1.0)
        if probs_BQV.shape[1] == 0:
            drawn_BV = self.target_BV
        else:
            row_B = torch.arange(len(source_B), device=source_B.device)
            drawn_BV = probs_BQV[row_B, source_B.clamp(min=0)].to(self.target_BV.dtype)
        reduced_B1 = (self._removed_B & self._distinct_B)[:, None]
        drawn_BV = torch.where(reduced_B1, self._remaining_BV, drawn_BV)
        return torch.where(chosen_B1, one_hot_BV, drawn_BV)

    def reject(self, rejected_B: Tensor, q_BV: Tensor) -> None:
        """The target's residual: norm(max(0, p − q))."""
        rest_BV = (self.residual_BV - q_BV).clamp(min=0)
        mass_B1 = rest_BV.sum(-1, keepdim=True)
        normed_BV = rest_BV / mass_B1.clamp(min=torch.finfo(rest_BV.dtype).tiny)
        # p = q leaves no residual. Only rounding can reject there, and p itself is right.
        self.residual_BV = torch.where(
            rejected_B[:, None] & (mass_B1 > 0), normed_BV, self.residual_BV
        )

    def remove(self, drawn_B: Tensor, q_BV: Tensor, token_B1: Tensor) -> None:
        """The draft's remainder after a drawn candidate was rejected: q without it."""
        without_BV = q_BV.scatter(1, token_B1, 0.0)
        self._remaining_BV = torch.where(drawn_B[:, None], without_BV, self._remaining_BV)
        self._removed_B = self._removed_B | drawn_B

    def enter(self, accepted_B: Tensor, target_BV: Tensor) -> None:
        """Starts anew at the accepted candidate, whose target distribution is given."""
        self.target_BV = target_BV
        self.residual_BV = torch.where(accepted_B[:, None], target_BV, self.residual_BV)
        self._removed_B = self._removed_B & ~accepted_B
