"""The likelihood of acceptance, alone and mixed with KL (arXiv 2602.23881)."""

import torch
from torch import Tensor

from trainer.divergences.forward_kl import forward_kl
from trainer.divergences.registry import register
from trainer.truncated import EPSILON


@register("acceptance")
def acceptance_likelihood(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """−log Σ min(p, q) [P]: the negative log-likelihood of acceptance."""
    overlap_P = torch.minimum(p_PC, draft_logp_PC.exp()).sum(-1)
    return -overlap_P.clamp(min=EPSILON).log()


@register("kl+acceptance", takes_beta=True, searched=True)
def kl_and_acceptance(p_PC: Tensor, draft_logp_PC: Tensor, beta: float) -> Tensor:
    """β KL(p‖q) − (1 − β) log Σ min(p, q) [P]. The second term alone has a vanishing gradient."""
    kl_P = forward_kl(p_PC, draft_logp_PC)
    return beta * kl_P + (1 - beta) * acceptance_likelihood(p_PC, draft_logp_PC)
