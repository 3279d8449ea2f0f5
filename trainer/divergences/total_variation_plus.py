"""TVD++ (arXiv 2403.00858): total variation by a policy gradient with a normalised reward."""

from torch import Tensor

from trainer.divergences.registry import register
from trainer.truncated import EPSILON


@register("tvd++")
def total_variation_plus(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """The policy gradient of the reward r = 1[p > q], normalised to an advantage [P].

    The gradient of TVD is that of −Σ q r. The paper samples x from q; this
    takes the expectation over the classes. Mean and deviation of the reward
    are taken over all positions. Only the gradient is meaningful, not the
    value.
    """
    q_PC = draft_logp_PC.exp().detach()
    reward_PC = (p_PC > q_PC).to(q_PC.dtype)
    mean = (q_PC * reward_PC).sum(-1).mean()
    deviation = (mean * (1 - mean)).clamp(min=EPSILON).sqrt()
    advantage_PC = (reward_PC - mean) / deviation
    return -(q_PC * advantage_PC * draft_logp_PC).sum(-1)
