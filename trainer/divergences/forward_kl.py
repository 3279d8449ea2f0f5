"""Forward KL (DistillSpec, arXiv 2310.08461, section 3)."""

import torch
from torch import Tensor

from trainer.divergences.registry import register


@register("forward_kl")
def forward_kl(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """KL(p‖q) [P]."""
    loss_P: Tensor = (torch.special.xlogy(p_PC, p_PC) - p_PC * draft_logp_PC).sum(-1)
    return loss_P
