"""What the draft is trained to make small: divergences between two distributions, per position.

The target's distribution is logged truncated: its K most likely tokens, and the mass of all others. `classes` makes
K + 1 classes of it and of the draft's (the K tokens, and the rest as one), and every divergence is a function of those.
With K = V it is the divergence itself. With fewer it is that of a coarser pair of distributions, which for all of them
but TVD++ is a lower bound (data-processing inequality); its gradient leaves the rest's mass where it belongs, where
renormalised top-k would push it to zero.

Pure functions. Legend: P supervised positions, K = top-k, C = K + 1 classes, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

EPSILON = 1e-8
Divergence = Callable[[Tensor, Tensor], Tensor]  # p_PC, draft_logp_PC → loss [P]


@dataclass(frozen=True, slots=True)
class Truncated:
    """A distribution of which K tokens are known, and the mass of all others together."""

    ids_PK: Tensor
    logp_PK: Tensor
    rest_P: Tensor

    @property
    def classes_PC(self) -> Tensor:
        return torch.cat([self.logp_PK.exp(), self.rest_P[:, None]], -1)

    def at(self, temperature_P: Tensor) -> "Truncated":
        """After a temperature: p^(1/T), normalised. Exact at T = 1.

        How the rest is spread is not known. It is taken to consist of tokens as likely as the last known one, which at
        T < 1 is the most and at T > 1 the least that its mass can become.
        """
        power_P = 1 / temperature_P
        logp_PK = self.logp_PK * power_P[:, None]
        rest_logp_P = self.rest_P.clamp(min=EPSILON).log() + self.logp_PK[:, -1] * (power_P - 1)
        norm_P = torch.cat([logp_PK, rest_logp_P[:, None]], -1).logsumexp(-1)
        return Truncated(self.ids_PK, logp_PK - norm_P[:, None], (rest_logp_P - norm_P).exp())


def draft_classes(draft_logits_PV: Tensor, ids_PK: Tensor) -> Tensor:
    """The draft's log-probabilities of the K tokens, and of all others together [P, C]."""
    top_PK = draft_logits_PV.log_softmax(-1).gather(-1, ids_PK)
    rest_P = (1 - top_PK.exp().sum(-1)).clamp(min=EPSILON).log()
    return torch.cat([top_PK, rest_P[:, None]], -1)


# ── DistillSpec, arXiv 2310.08461, section 3 and appendix ──


def forward_kl(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """KL(p‖q)."""
    loss_P: Tensor = (torch.special.xlogy(p_PC, p_PC) - p_PC * draft_logp_PC).sum(-1)
    return loss_P


def reverse_kl(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """KL(q‖p). A class that the target gives nothing counts as if it gave ε: what is logged is rounded anyway."""
    return (draft_logp_PC.exp() * (draft_logp_PC - p_PC.clamp(min=EPSILON).log())).sum(-1)


def jensen_shannon(p_PC: Tensor, draft_logp_PC: Tensor, beta: float) -> Tensor:
    """JSD[β] = β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q."""
    q_PC = draft_logp_PC.exp()
    m_PC = beta * p_PC + (1 - beta) * q_PC
    m_logp_PC = m_PC.clamp(min=EPSILON).log()
    return beta * forward_kl(p_PC, m_logp_PC) + (1 - beta) * (
        q_PC * (draft_logp_PC - m_logp_PC)
    ).sum(-1)


def total_variation(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """½ Σ |p − q|: one minus the probability that a drafted token is accepted."""
    return (p_PC - draft_logp_PC.exp()).abs().sum(-1) / 2


# ── later work ──


def total_variation_plus(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """TVD++ (arXiv 2403.00858): the policy gradient of the reward r = 1[p > q], normalised to an advantage.

    The gradient of TVD is that of −Σ q r. The paper draws x from q; here the expectation over the classes is taken, and
    mean and deviation of the reward are those of all positions together. Its value means nothing, its gradient does.
    """
    q_PC = draft_logp_PC.exp().detach()
    reward_PC = (p_PC > q_PC).to(q_PC.dtype)
    mean = (q_PC * reward_PC).sum(-1).mean()
    deviation = (mean * (1 - mean)).clamp(min=EPSILON).sqrt()
    return -(q_PC * (reward_PC - mean) / deviation * draft_logp_PC).sum(-1)


def acceptance_likelihood(p_PC: Tensor, draft_logp_PC: Tensor) -> Tensor:
    """−log Σ min(p, q): the likelihood of being accepted (arXiv 2602.23881)."""
    return -torch.minimum(p_PC, draft_logp_PC.exp()).sum(-1).clamp(min=EPSILON).log()


def mixed(p_PC: Tensor, draft_logp_PC: Tensor, beta: float) -> Tensor:
    """β KL(p‖q) − (1 − β) log Σ min(p, q): the second alone has no gradient that leads far (arXiv 2602.23881)."""
    return beta * forward_kl(p_PC, draft_logp_PC) + (1 - beta) * acceptance_likelihood(
        p_PC, draft_logp_PC
    )


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "tvd++": total_variation_plus,
    "acceptance": acceptance_likelihood,
    "kl+acceptance": mixed,
}
WITH_BETA = ("jsd", "kl+acceptance")


def divergence(name: str, beta: float) -> Divergence:
    """By its name in a recipe. β matters to those `WITH_BETA`.

    Raises:
        ValueError: no such divergence.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: {name!r} is none of {', '.join(DIVERGENCES)}")
    return partial(DIVERGENCES[name], beta=beta) if name in WITH_BETA else DIVERGENCES[name]


# ── what drafts are judged by ──


def overlap(draft_logits_PV: Tensor, target: Truncated) -> Tensor:
    """Σ min(p, q) over the logged tokens [P]: the acceptance probability at temperature 1, from below."""
    draft_top_p_PK = draft_logits_PV.log_softmax(-1).gather(-1, target.ids_PK).exp()
    return torch.minimum(target.logp_PK.exp(), draft_top_p_PK).sum(-1)


def greedy_match(draft_logits_PV: Tensor, target: Truncated) -> Tensor:
    """1 where draft and target prefer the same token [P]: the acceptance at temperature 0."""
    return (draft_logits_PV.argmax(-1) == target.ids_PK[:, 0]).to(draft_logits_PV.dtype)
