"""Verification of what was drafted: the emitted tokens follow the target's distribution, whatever the draft proposed.

Chains as a whole, by block verification (arXiv 2403.10444, algorithm 2), which keeps more of a chain than speculative
sampling, token by token, does (Leviathan et al., arXiv 2211.17192); trees as in `decoder/verification/tree.py`. For CPUs all of it
is compiled, too. Pure functions; randomness comes in as uniforms in [0, 1). Sequences that ask for lenience give exactness
up, and only they: see `decoder/verification/lenience.py`.

Legend: B sequences, N candidates of a sequence at most (G of a chain), T = N + 1 verified nodes, V vocabulary.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from decoder.device.transfer import to_host
from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import CHOSEN, Proposal, Tree
from decoder.verification.sampling import Sampling, compiled, most_likely, probabilities, sample
from decoder.verification.tree import verify_tree, verify_tree_greedy


@dataclass(frozen=True, slots=True)
class Verification:
    accepted_B: Tensor  # candidates kept
    path_BN: Tensor  # which ones, in order; padded
    next_B: Tensor  # the token after them, the target's own
    next_p_B: Tensor  # its probability under the target
    overlap_B: Tensor  # Σ over compared nodes of Σ_x min(p(x), q(x)), where q is of the node's first candidate
    compared_B: Tensor  # nodes on the way that had a candidate of a draft's

    def read(self, tokens_BN: Tensor) -> "list[VerifiedSequence]":
        """Everything the host needs, by sequence, in the step's one transfer."""
        columns = to_host(*(getattr(self, field.name) for field in fields(self)), tokens_BN)
        return list(map(VerifiedSequence._make, zip(*columns, strict=True)))


class VerifiedSequence(NamedTuple):
    """One sequence's."""

    accepted: int
    path: list[int]
    next: int
    next_p: float
    overlap: float
    compared: int
    tokens: list[int]  # all candidates

    @property
    def emitted(self) -> list[int]:
        return [*(self.tokens[n] for n in self.path[: self.accepted]), self.next]


def verify(
    logits_BTV: Tensor,
    proposal: Proposal,
    sampling: Sampling,
    accept_uniform_BN: Tensor,
    emit_uniform_B: Tensor,
    lenient: LenientAcceptance | None = None,
) -> Verification:
    """What a step emits, given the target's logits at the last token and at every candidate."""
    tree, own = proposal.tree, (sampling.divisor_B, sampling.greedy_B)
    proposed = proposal.probs_BQV, proposal.tokens_BN
    drawn = accept_uniform_BN, emit_uniform_B
    if (fused := compiled(logits_BTV)) is not None:
        truncated = sampling.any_truncated and not sampling.all_greedy
        probs = probabilities(logits_BTV, sampling) if truncated else None
        factors = () if lenient is None else (lenient.scale_B, lenient.power_B)
        return Verification(
            *fused.verify(
                logits_BTV, probs, *proposed, tree, proposal.drafted_B, *own, *drawn, *factors
            )
        )
    if sampling.all_greedy:
        best_BT = most_likely(logits_BTV)
        if tree is None or all(tree.chains):
            chosen_BG = None if tree is None else tree.sources_BN == CHOSEN
            return verify_chain_greedy(best_BT, proposal.tokens_BN, proposal.drafted_B, chosen_BG)
        return Verification(
            *verify_tree_greedy(best_BT, proposal.tokens_BN, tree, proposal.drafted_B)
        )
    probs_BTV = probabilities(logits_BTV, sampling)
    if logits_BTV.shape[1] == 1:
        return _plain(probs_BTV[:, 0], emit_uniform_B)
    if tree is None:
        return verify_block(probs_BTV, *proposed, proposal.drafted_B, *drawn, lenient)
    return _apart(probs_BTV, proposal, tree, sampling.greedy_B, *drawn, lenient)


def _apart(
    probs_BTV: Tensor,
    proposal: Proposal,
    tree: Tree,
    greedy_B: Tensor,
    accept_uniform_BN: Tensor,
    emit_uniform_B: Tensor,
    lenient: LenientAcceptance | None,
) -> Verification:
    """Chains as a whole, and the other sequences."""
    parts = []
    for rows in (
        [b for b, chain in enumerate(tree.chains) if chain == wanted] for wanted in (True, False)
    ):
        if not rows:
            continue
        own, part = None if lenient is None else lenient.select(rows), tree.select(rows)
        p_BTV, q_BQV, tokens_BN = (
            probs_BTV[rows],
            proposal.probs_BQV[rows],
            proposal.tokens_BN[rows],
        )
        drafted_B, drawn = proposal.drafted_B[rows], (accept_uniform_BN[rows], emit_uniform_B[rows])
        if tree.chains[rows[0]]:
            q_BNV = _by_candidate(q_BQV, tokens_BN, part.sources_BN)
            found = verify_block(
                p_BTV, q_BNV, tokens_BN, drafted_B, *drawn, own, part.sources_BN == CHOSEN
            )
        else:
            found = Verification(
                *verify_tree(p_BTV, q_BQV, tokens_BN, part, drafted_B, greedy_B[rows], *drawn, own)
            )
        parts.append((rows, found))
    if len(parts) == 1:
        return parts[0][1]
    order_B = (
        torch.tensor([row for rows, _ in parts for row in rows]).argsort().to(probs_BTV.device)
    )
    return Verification(
        *(
            torch.cat([getattr(found, field.name) for _, found in parts])[order_B]
            for field in fields(Verification)
        )
    )


def _by_candidate(q_BQV: Tensor, tokens_BN: Tensor, sources_BN: Tensor) -> Tensor:
    """What each candidate was drawn from; a chosen one from a distribution that is sure of it."""
    sure_BNV = torch.zeros(
        (*tokens_BN.shape, q_BQV.shape[-1]), dtype=q_BQV.dtype, device=q_BQV.device
    )
    sure_BNV.scatter_(2, tokens_BN[..., None], 1.0)
    if not q_BQV.shape[1]:
        return sure_BNV
    row_B1, last = (
        torch.arange(len(tokens_BN), device=tokens_BN.device)[:, None],
        q_BQV.shape[1] - 1,
    )
    drawn_BNV = q_BQV[
        row_B1, sources_BN.clamp(0, last)
    ]  # padding has a source of its shape's, which may not be there
    return torch.where((sources_BN == CHOSEN)[..., None], sure_BNV, drawn_BNV)


def verify_chain_greedy(
    best_BT: Tensor, draft_tokens_BG: Tensor, drafted_B: Tensor, chosen_BG: Tensor | None = None
) -> Verification:
    """`verify_block` where all distributions have their mass on one token: keeps the draft as far as it is the target's."""
    if not draft_tokens_BG.shape[1]:
        nothing_B = torch.zeros_like(drafted_B)
        return _of_chain(
            draft_tokens_BG, nothing_B, best_BT[:, 0], nothing_B + 1, nothing_B, nothing_B
        )
    position_G = torch.arange(draft_tokens_BG.shape[1], device=drafted_B.device)
    drafted_BG = position_G < drafted_B[:, None]
    accepted_B = ((draft_tokens_BG == best_BT[:, :-1]) & drafted_BG).long().cumprod(-1).sum(-1)
    next_B = best_BT.gather(1, accepted_B[:, None]).squeeze(1)
    overlap_B, compared_B = accepted_B, torch.minimum(accepted_B + 1, drafted_B)
    if chosen_BG is not None:
        kept_BG, met_BG = (position_G < end_B[:, None] for end_B in (accepted_B, compared_B))
        overlap_B, compared_B = ((part_BG & ~chosen_BG).sum(-1) for part_BG in (kept_BG, met_BG))
    return _of_chain(
        draft_tokens_BG, accepted_B, next_B, torch.ones_like(accepted_B), overlap_B, compared_B
    )


def _plain(probs_BV: Tensor, emit_uniform_B: Tensor) -> Verification:
    next_B = sample(probs_BV, emit_uniform_B)
    nothing_B = torch.zeros_like(next_B)
    next_p_B = probs_BV.gather(1, next_B[:, None]).squeeze(1)
    return _of_chain(next_B[:, None][:, :0], nothing_B, next_B, next_p_B, nothing_B, nothing_B)


def verify_block(
    target_probs_BTV: Tensor,
    draft_probs_BGV: Tensor,
    draft_tokens_BG: Tensor,
    drafted_B: Tensor,
    accept_uniform_BG: Tensor,
    emit_uniform_B: Tensor,
    lenient: LenientAcceptance | None = None,
    chosen_BG: Tensor | None = None,
) -> Verification:
    """Accepts a prefix of each sequence's chain and draws the token that follows it.

    A prefix of i tokens is worth r_i = min(1, r_{i−1} p_i / q_i). Of those that pass, each by a uniform of its own, the
    longest is kept: the whole chain passes with probability r_γ, and a shorter one with R_i / (R_i + 1 − r_i), where
    R_i = Σ max(0, r_i p − q) over what may follow it; then comes a token from norm(max(0, r_i p − q)). In the mean that
    keeps no fewer tokens than one by one. A prefix is kept with probability r_i in the mean over all that may follow
    it. So q_i, whether there is a token i + 1, and whether it is one that q is sure of (`chosen_BG`) may depend on the
    tokens before, but nothing else on what was drawn, least of all this rule. Distributions are the ones after
    temperature, top-k and top-p. Positions from `drafted_B[b]` on are padding.
    A lenient sequence keeps one token after another, x with probability min(1, f(p(x)) / q(x)), and the next one comes from
    norm(max(0, p − q)).
    """
    target_BGV, told = (
        target_probs_BTV[:, :-1],
        (draft_tokens_BG[..., None], drafted_B, accept_uniform_BG),
    )
    accepted_B, worth_B = _whole(target_BGV, draft_probs_BGV, *told)
    if lenient is not None:
        one_by_one_B = _one_by_one(target_BGV, draft_probs_BGV, *told, lenient)
        accepted_B = torch.where(lenient.exact_B, accepted_B, one_by_one_B)
        worth_B = torch.where(lenient.exact_B, worth_B, 1.0)
    position_G = torch.arange(draft_tokens_BG.shape[1], device=drafted_B.device)
    compared_BG = (position_G < drafted_B[:, None]) & (position_G <= accepted_B[:, None])
    if chosen_BG is not None:
        compared_BG &= ~chosen_BG
    overlap_BG = torch.minimum(target_BGV, draft_probs_BGV).sum(-1)

    emit_BV = _emit_probs(target_probs_BTV, draft_probs_BGV, accepted_B, drafted_B, worth_B)
    next_B = sample(emit_BV, emit_uniform_B)
    row_B = torch.arange(len(next_B), device=next_B.device)
    next_p_B, overlap_B = (
        target_probs_BTV[row_B, accepted_B, next_B],
        (overlap_BG * compared_BG).sum(-1),
    )
    return _of_chain(draft_tokens_BG, accepted_B, next_B, next_p_B, overlap_B, compared_BG.sum(-1))


def _whole(
    p_BGV: Tensor, q_BGV: Tensor, tokens_BG1: Tensor, drafted_B: Tensor, uniform_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """The length of the prefix that is kept, and what it is worth."""
    p_BG, q_BG = (x_BGV.gather(-1, tokens_BG1).squeeze(-1).double() for x_BGV in (p_BGV, q_BGV))
    accepted_B, worth_B = torch.zeros_like(drafted_B), torch.ones_like(p_BG[:, 0])
    kept_worth_B = worth_B
    for g in range(p_BG.shape[1]):
        if g:
            left_B = (worth_B[:, None] * p_BGV[:, g] - q_BGV[:, g]).clamp(min=0).sum(-1)
            kept_B = (uniform_BG[:, g - 1] * (left_B + 1 - worth_B) < left_B) & (g < drafted_B)
            accepted_B = torch.where(kept_B, g, accepted_B)
            kept_worth_B = torch.where(kept_B, worth_B, kept_worth_B)
        follows_B = torch.where(q_BG[:, g] > 0, worth_B * p_BG[:, g] / q_BG[:, g], 0.0).clamp(max=1)
        worth_B = torch.where(g < drafted_B, follows_B, worth_B)
    last_B = uniform_BG.gather(1, (drafted_B - 1).clamp(min=0)[:, None]).squeeze(1)
    all_B = (last_B < worth_B) & (drafted_B > 0)
    return torch.where(all_B, drafted_B, accepted_B), torch.where(all_B, worth_B, kept_worth_B)


def _one_by_one(
    p_BGV: Tensor,
    q_BGV: Tensor,
    tokens_BG1: Tensor,
    drafted_B: Tensor,
    uniform_BG: Tensor,
    lenient: LenientAcceptance,
) -> Tensor:
    p_BG, q_BG = (x_BGV.gather(-1, tokens_BG1).squeeze(-1) for x_BGV in (p_BGV, q_BGV))
    drafted_BG = torch.arange(p_BG.shape[1], device=p_BG.device) < drafted_B[:, None]
    return ((uniform_BG * q_BG < lenient(p_BG)) & drafted_BG).long().cumprod(-1).sum(-1)


def _of_chain(
    tokens_BG: Tensor,
    accepted_B: Tensor,
    next_B: Tensor,
    next_p_B: Tensor,
    overlap_B: Tensor,
    compared_B: Tensor,
) -> Verification:
    path_BN = torch.arange(tokens_BG.shape[1], device=tokens_BG.device).expand_as(tokens_BG)
    return Verification(accepted_B, path_BN, next_B, next_p_B, overlap_B, compared_B)


def _emit_probs(
    target_probs_BTV: Tensor,
    draft_probs_BGV: Tensor,
    accepted_B: Tensor,
    drafted_B: Tensor,
    worth_B: Tensor,
) -> Tensor:
    """What the token after the accepted prefix is drawn from, unnormalised [B, V]."""
    row_B = torch.arange(len(accepted_B), device=accepted_B.device)
    target_BV = target_probs_BTV[row_B, accepted_B]
    draft_BV = draft_probs_BGV[row_B, accepted_B.clamp(max=draft_probs_BGV.shape[1] - 1)]
    residual_BV = (worth_B[:, None].to(target_BV.dtype) * target_BV - draft_BV).clamp(min=0)
    # p = q leaves no residual, and then nothing is rejected but by rounding: p itself is right.
    rejected_B1 = ((accepted_B < drafted_B) & (residual_BV.sum(-1) > 0))[:, None]
    return torch.where(rejected_B1, residual_BV, target_BV)
