"""Generalised Jensen–Shannon divergence (DistillSpec, arXiv 2310.08461, appendix)."""

from torch import Tensor

from trainer.divergences.forward_kl import forward_kl
from trainer.divergences.registry import register
from trainer.truncated import EPSILON


@register("jsd", takes_beta=True)
def jensen_shannon(p_PC: Tensor, draft_logp_PC: Tensor, beta: float) -> Tensor:
    """JSD[β] = β KL(p‖m) + (1 − β) KL(q‖m) [P], with m = βp + (1 − β)q."""
    q_PC = draft_logp_PC.exp()
    m_PC = beta * p_PC + (1 - beta) * q_PC
    m_logp_PC = m_PC.clamp(min=EPSILON).log()
    target_P = forward_kl(p_PC, m_logp_PC)
    draft_P = (q_PC * (draft_logp_PC - m_logp_PC)).sum(-1)
    return beta * target_P + (1 - beta) * draft_P
