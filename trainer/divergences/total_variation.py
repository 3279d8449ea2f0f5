"""Total variation (DistillSpec, arXiv 2310.08461, appendix)."""

from torch import Tensor

from trainer.divergences.registry import register


@register("tvd")
def total_variation(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """½ Σ |p − q| [P]: one minus the acceptance rate of a drafted token."""
    return (p_PC - draft_logp_PC.exp()).abs().sum(-1) / 2
