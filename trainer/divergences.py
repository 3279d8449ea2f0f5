"""What the draft is trained to make small: divergences between two distributions, per position.

The target's distribution is logged truncated: its K most likely tokens, and the mass of all others. `classes` makes
K + 1 classes of it and of the draft's (the K tokens, and the rest as one), and every divergence is a function of those.
With K = V it is the divergence itself. With fewer it is that of a coarser pair of distributions, which for all of them
but TVD++ is a lower bound (data-processing inequality); its gradient leaves the rest's mass where it belongs, where
renormalised top-k would push it to zero.

Pure functions. Legend: N positions, K = top-k, C = K + 1 classes, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

EPSILON = 1e-8
Divergence = Callable[[Tensor, Tensor], Tensor]  # p_NC, draft_logp_NC → loss [N]


@dataclass(frozen=True, slots=True)
class Truncated:
    """A distribution of which K tokens are known, and the mass of all others together."""

    ids_NK: Tensor
    logp_NK: Tensor
    rest_N: Tensor

    @property
    def classes_NC(self) -> Tensor:
        return torch.cat([self.logp_NK.exp(), self.rest_N[:, None]], -1)

    def at(self, temperature_N: Tensor) -> "Truncated":
        """After a temperature: p^(1/T), normalised. Exact at T = 1.

        How the rest is spread is not known. It is taken to consist of tokens as likely as the last known one, which at
        T < 1 is the most and at T > 1 the least that its mass can become.
        """
        power_N = 1 / temperature_N
        logp_NK = self.logp_NK * power_N[:, None]
        rest_logp_N = self.rest_N.clamp(min=EPSILON).log() + self.logp_NK[:, -1] * (power_N - 1)
        norm_N = torch.cat([logp_NK, rest_logp_N[:, None]], -1).logsumexp(-1)
        return Truncated(self.ids_NK, logp_NK - norm_N[:, None], (rest_logp_N - norm_N).exp())


def draft_classes(draft_logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The draft's log-probabilities of the K tokens, and of all others together [N, C]."""
    top_NK = draft_logits_NV.log_softmax(-1).gather(-1, ids_NK)
    rest_N = (1 - top_NK.exp().sum(-1)).clamp(min=EPSILON).log()
    return torch.cat([top_NK, rest_N[:, None]], -1)


# ── DistillSpec, arXiv 2310.08461, section 3 and appendix ──


def forward_kl(p_NC: Tensor, draft_logp_NC: Tensor) -> Tensor:
    """KL(p‖q)."""
    loss_N: Tensor = (torch.special.xlogy(p_NC, p_NC) - p_NC * draft_logp_NC).sum(-1)
    return loss_N


def reverse_kl(p_NC: Tensor, draft_logp_NC: Tensor) -> Tensor:
    """KL(q‖p). A class that the target gives nothing counts as if it gave ε: what is logged is rounded anyway."""
    return (draft_logp_NC.exp() * (draft_logp_NC - p_NC.clamp(min=EPSILON).log())).sum(-1)


def jensen_shannon(p_NC: Tensor, draft_logp_NC: Tensor, beta: float) -> Tensor:
    """JSD[β] = β KL(p‖m) + (1 − β) KL(q‖m) with m = βp + (1 − β)q."""
    q_NC = draft_logp_NC.exp()
    m_NC = beta * p_NC + (1 - beta) * q_NC
    m_logp_NC = m_NC.clamp(min=EPSILON).log()
    return beta * forward_kl(p_NC, m_logp_NC) + (1 - beta) * (
        q_NC * (draft_logp_NC - m_logp_NC)
    ).sum(-1)


def total_variation(p_NC: Tensor, draft_logp_NC: Tensor) -> Tensor:
    """½ Σ |p − q|: one minus the probability that a drafted token is accepted."""
    return (p_NC - draft_logp_NC.exp()).abs().sum(-1) / 2


# ── later work ──


def total_variation_plus(p_NC: Tensor, draft_logp_NC: Tensor) -> Tensor:
    """TVD++ (arXiv 2403.00858): the policy gradient of the reward r = 1[p > q], normalised to an advantage.

    The gradient of TVD is that of −Σ q r. The paper draws x from q; here the expectation over the classes is taken, and
    mean and deviation of the reward are those of all positions together. Its value means nothing, its gradient does.
    """
    q_NC = draft_logp_NC.exp().detach()
    reward_NC = (p_NC > q_NC).to(q_NC.dtype)
    mean = (q_NC * reward_NC).sum(-1).mean()
    deviation = (mean * (1 - mean)).clamp(min=EPSILON).sqrt()
    return -(q_NC * (reward_NC - mean) / deviation * draft_logp_NC).sum(-1)


def acceptance_likelihood(p_NC: Tensor, draft_logp_NC: Tensor) -> Tensor:
    """−log Σ min(p, q): the likelihood of being accepted (arXiv 2602.23881)."""
    return -torch.minimum(p_NC, draft_logp_NC.exp()).sum(-1).clamp(min=EPSILON).log()


def mixed(p_NC: Tensor, draft_logp_NC: Tensor, beta: float) -> Tensor:
    """β KL(p‖q) − (1 − β) log Σ min(p, q): the second alone has no gradient that leads far (arXiv 2602.23881)."""
    return beta * forward_kl(p_NC, draft_logp_NC) + (1 - beta) * acceptance_likelihood(
        p_NC, draft_logp_NC
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


def overlap(draft_logits_NV: Tensor, truth: Truncated) -> Tensor:
    """Σ min(p, q) over the logged tokens [N]: the acceptance probability at temperature 1, from below."""
    draft_top_p_NK = draft_logits_NV.log_softmax(-1).gather(-1, truth.ids_NK).exp()
    return torch.minimum(truth.logp_NK.exp(), draft_top_p_NK).sum(-1)


def greedy_match(draft_logits_NV: Tensor, truth: Truncated) -> Tensor:
    """1 where draft and target prefer the same token [N]: the acceptance at temperature 0."""
    return (draft_logits_NV.argmax(-1) == truth.ids_NK[:, 0]).to(draft_logits_NV.dtype)
