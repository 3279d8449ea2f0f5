"""Reverse KL (DistillSpec, arXiv 2310.08461, appendix)."""

from torch import Tensor

from trainer.divergences.registry import register
from trainer.truncated import EPSILON


@register("reverse_kl")
def reverse_kl(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """KL(q‖p) [P]. A class of target mass 0 counts as ε, since logged values are rounded."""
    p_logp_PC = p_PC.clamp(min=EPSILON).log()
    return (draft_logp_PC.exp() * (draft_logp_PC - p_logp_PC)).sum(-1)
