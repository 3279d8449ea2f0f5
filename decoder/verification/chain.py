"""Verification of chains, in torch's operations: the reference of the compiled rules, and CUDA's.

Block verification (arXiv 2403.10444, algorithm 2) accepts more of a chain than token by token
rejection (Leviathan et al., arXiv 2211.17192), which lenient sequences use.

Legend: B sequences, G tokens of a chain, T = G + 1 verified positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Uniforms, sample
from decoder.verification.token_tree import CHOSEN


@dataclass(frozen=True, slots=True)
class Chains:
    """The drafted chains of a batch."""

    tokens_BG: Tensor
    probs_BGV: Tensor  # the distribution of each token's draw; one-hot where it was chosen
    drafted_B: Tensor  # tokens from this index on are padding
    chosen_BG: Tensor | None = None  # tokens that were chosen, not drawn; None: all were drawn

    @classmethod
    def of(cls, proposal: Proposal) -> "Chains":
        """The chains of a proposal in which every sequence drafted one."""
        tokens_BG, tree = proposal.tokens_BN, proposal.tree
        if tree is None:
            return cls(tokens_BG, proposal.probs_BQV, proposal.drafted_B)
        probs_BGV = _probs_by_token(proposal.probs_BQV, tokens_BG, tree.sources_BN)
        return cls(tokens_BG, probs_BGV, proposal.drafted_B, tree.sources_BN == CHOSEN)

    @property
    def index_G(self) -> Tensor:
        return torch.arange(self.tokens_BG.shape[1], device=self.tokens_BG.device)

    @property
    def real_BG(self) -> Tensor:
        """Which tokens are no padding."""
        return self.index_G < self.drafted_B[:, None]

    def probs_of_tokens(self, probs_BGV: Tensor) -> Tensor:
        """The probability of each drafted token under given distributions, [B, G]."""
        return probs_BGV.gather(-1, self.tokens_BG[..., None]).squeeze(-1)


def verify_plain(probs_BV: Tensor, uniforms: Uniforms) -> Verification:
    """A step without a draft: samples from the target."""
    next_B = sample(probs_BV, uniforms.emit_B)
    next_p_B = probs_BV.gather(1, next_B[:, None]).squeeze(1)
    zero_B = torch.zeros_like(next_B)
    no_tokens_BG = next_B[:, None][:, :0]
    return Verification.of_chain(no_tokens_BG, zero_B, next_B, next_p_B, zero_B, zero_B)


def verify_chain_greedy(
    best_BT: Tensor, tokens_BG: Tensor, drafted_B: Tensor, chosen_BG: Tensor | None = None
) -> Verification:
    """`verify_block` where every distribution is one-hot.

    Accepts drafted tokens as long as they equal the target's most likely tokens, `best_BT`.
    """
    if not tokens_BG.shape[1]:
        zero_B = torch.zeros_like(drafted_B)
        return Verification.of_chain(tokens_BG, zero_B, best_BT[:, 0], zero_B + 1, zero_B, zero_B)
    index_G = torch.arange(tokens_BG.shape[1], device=drafted_B.device)
    right_BG = (tokens_BG == best_BT[:, :-1]) & (index_G < drafted_B[:, None])
    accepted_B = right_BG.long().cumprod(-1).sum(-1)
    next_B = best_BT.gather(1, accepted_B[:, None]).squeeze(1)
    overlap_B, compared_B = accepted_B, torch.minimum(accepted_B + 1, drafted_B)
    if chosen_BG is not None:
        overlap_B = ((index_G < overlap_B[:, None]) & ~chosen_BG).sum(-1)
        compared_B = ((index_G < compared_B[:, None]) & ~chosen_BG).sum(-1)
    one_B = torch.ones_like(accepted_B)
    return Verification.of_chain(tokens_BG, accepted_B, next_B, one_B, overlap_B, compared_B)


def verify_block(
    target_probs_BTV: Tensor,
    chains: Chains,
    uniforms: Uniforms,
    lenient: LenientAcceptance | None = None,
) -> Verification:
    """Accepts a prefix of each sequence's chain and samples the token that follows it.

    A prefix of i tokens has the ratio r_i = min(1, r_{i−1} p_i / q_i), with r_0 = 1. Each prefix
    passes or fails by its own uniform, and the longest prefix that passes is accepted. The whole
    chain passes with probability r_γ, a shorter prefix with R_i / (R_i + 1 − r_i), where
    R_i = Σ_x max(0, r_i p(x) − q(x)) over the next token x. The emitted token then has the
    distribution norm(max(0, r_i p − q)). The expected number of accepted tokens is at least that
    of token by token rejection.

    Averaged over all continuations, a prefix is accepted with probability r_i. Exactness therefore
    requires that q_i, the length of the chain, and `chosen_BG` depend on the tokens before, and on
    nothing else that was drawn. Which rule verifies a sequence must not depend on its draws at all.

    Distributions are those after temperature, top-k and top-p. A lenient sequence accepts token by
    token, x with probability min(1, f(p(x)) / q(x)), and emits from norm(max(0, p − q)).
    """
    target_BGV = target_probs_BTV[:, :-1]
    accepted_B, ratio_B = _longest_prefix(target_BGV, chains, uniforms.accept_BN)
    if lenient is not None:
        tokenwise_B = _accept_tokenwise(target_BGV, chains, uniforms.accept_BN, lenient)
        accepted_B = torch.where(lenient.exact_B, accepted_B, tokenwise_B)
        ratio_B = torch.where(lenient.exact_B, ratio_B, 1.0)
    emit_BV = _emit_weights(target_probs_BTV, chains, accepted_B, ratio_B)
    next_B = sample(emit_BV, uniforms.emit_B)
    row_B = torch.arange(len(next_B), device=next_B.device)
    next_p_B = target_probs_BTV[row_B, accepted_B, next_B]
    overlap_B, compared_B = _overlap(target_BGV, chains, accepted_B)
    return Verification.of_chain(
        chains.tokens_BG, accepted_B, next_B, next_p_B, overlap_B, compared_B
    )


def _longest_prefix(
    target_BGV: Tensor, chains: Chains, uniform_BG: Tensor
) -> tuple[Tensor, Tensor]:
    """The length of the longest prefix that passes, and its ratio, in float64."""
    p_BG = chains.probs_of_tokens(target_BGV).double()
    q_BG = chains.probs_of_tokens(chains.probs_BGV).double()
    drafted_B = chains.drafted_B
    accepted_B, ratio_B = torch.zeros_like(drafted_B), torch.ones_like(p_BG[:, 0])
    accepted_ratio_B = ratio_B
    for g in range(p_BG.shape[1]):
        real_B = g < drafted_B
        if g:
            residual_BV = (ratio_B[:, None] * target_BGV[:, g] - chains.probs_BGV[:, g]).clamp(
                min=0
            )
            residual_B = residual_BV.sum(-1)
            passes_B = uniform_BG[:, g - 1] * (residual_B + 1 - ratio_B) < residual_B
            accepted_B = torch.where(passes_B & real_B, g, accepted_B)
            accepted_ratio_B = torch.where(passes_B & real_B, ratio_B, accepted_ratio_B)
        next_ratio_B = torch.where(q_BG[:, g] > 0, ratio_B * p_BG[:, g] / q_BG[:, g], 0.0)
        ratio_B = torch.where(real_B, next_ratio_B.clamp(max=1), ratio_B)
    last_B = uniform_BG.gather(1, (drafted_B - 1).clamp(min=0)[:, None]).squeeze(1)
    whole_B = (last_B < ratio_B) & (drafted_B > 0)
    return (
        torch.where(whole_B, drafted_B, accepted_B),
        torch.where(whole_B, ratio_B, accepted_ratio_B),
    )


def _accept_tokenwise(
    target_BGV: Tensor, chains: Chains, uniform_BG: Tensor, lenient: LenientAcceptance
) -> Tensor:
    """Speculative sampling with f(p) in place of p: the number of tokens before a rejection."""
    p_BG = chains.probs_of_tokens(target_BGV)
    q_BG = chains.probs_of_tokens(chains.probs_BGV)
    accepted_BG = (uniform_BG * q_BG < lenient(p_BG)) & chains.real_BG
    return accepted_BG.long().cumprod(-1).sum(-1)


def _emit_weights(
    target_probs_BTV: Tensor, chains: Chains, accepted_B: Tensor, ratio_B: Tensor
) -> Tensor:
    """The weights of the emitted token, unnormalised, [B, V]."""
    row_B = torch.arange(len(accepted_B), device=accepted_B.device)
    target_BV = target_probs_BTV[row_B, accepted_B]
    last = chains.probs_BGV.shape[1] - 1
    draft_BV = chains.probs_BGV[row_B, accepted_B.clamp(max=last)]
    residual_BV = (ratio_B[:, None].to(target_BV.dtype) * target_BV - draft_BV).clamp(min=0)
    # p = q leaves no residual. Only rounding can reject there, and p itself is right.
    rejected_B = (accepted_B < chains.drafted_B) & (residual_BV.sum(-1) > 0)
    return torch.where(rejected_B[:, None], residual_BV, target_BV)


def _overlap(target_BGV: Tensor, chains: Chains, accepted_B: Tensor) -> tuple[Tensor, Tensor]:
    """Σ min(p, q) over the drawn tokens that verification came to, and their number."""
    compared_BG = chains.real_BG & (chains.index_G <= accepted_B[:, None])
    if chains.chosen_BG is not None:
        compared_BG &= ~chains.chosen_BG
    overlap_BG = torch.minimum(target_BGV, chains.probs_BGV).sum(-1)
    return (overlap_BG * compared_BG).sum(-1), compared_BG.sum(-1)


def _probs_by_token(probs_BQV: Tensor, tokens_BG: Tensor, sources_BG: Tensor) -> Tensor:
    """The distribution of each token's draw; one-hot where it was chosen."""
    shape = (*tokens_BG.shape, probs_BQV.shape[-1])
    one_hot_BGV = torch.zeros(shape, dtype=probs_BQV.dtype, device=probs_BQV.device)
    one_hot_BGV.scatter_(2, tokens_BG[..., None], 1.0)
    if not probs_BQV.shape[1]:
        return one_hot_BGV
    row_B1 = torch.arange(len(tokens_BG), device=tokens_BG.device)[:, None]
    # The source of a padded token may be out of range.
    drawn_BGV = probs_BQV[row_B1, sources_BG.clamp(0, probs_BQV.shape[1] - 1)]
    return torch.where((sources_BG == CHOSEN)[..., None], one_hot_BGV, drawn_BGV)
