"""What the draft is trained to make small. Pure functions over truncated distributions.

Legend: N positions, K = top-k, V vocabulary.
"""

import torch
from torch import Tensor

EPSILON = 1e-8


def forward_kl(draft_logits_NV: Tensor, top_ids_NK: Tensor, top_logp_NK: Tensor, rest_mass_N: Tensor) -> Tensor:
    """KL(p‖q) per position [N] of distributions of K + 1 classes: the K logged tokens, and all others together.

    The logged top-k with the rest as one class is a coarsening of p and q, so this is a lower bound of the KL over the
    whole vocabulary (data-processing inequality), and its gradient keeps the rest's mass where it belongs instead of
    pushing it to zero as renormalised top-k logits would. DistillSpec (arXiv 2310.08461) section 3, with D = FKL.
    """
    draft_logp_NV = draft_logits_NV.log_softmax(-1)
    draft_top_logp_NK = draft_logp_NV.gather(-1, top_ids_NK)
    top_p_NK = top_logp_NK.exp()
    inside_N = (top_p_NK * (top_logp_NK - draft_top_logp_NK)).sum(-1)
    draft_rest_N = (1 - draft_top_logp_NK.exp().sum(-1)).clamp(min=EPSILON)
    rest_N: Tensor = torch.special.xlogy(rest_mass_N, rest_mass_N / draft_rest_N)
    return inside_N + rest_N


def overlap(draft_logits_NV: Tensor, top_ids_NK: Tensor, top_logp_NK: Tensor) -> Tensor:
    """Σ min(p, q) over the logged tokens [N]: the acceptance probability at temperature 1, from below."""
    draft_top_p_NK = draft_logits_NV.log_softmax(-1).gather(-1, top_ids_NK).exp()
    return torch.minimum(top_logp_NK.exp(), draft_top_p_NK).sum(-1)


def greedy_match(draft_logits_NV: Tensor, top_ids_NK: Tensor) -> Tensor:
    """1 where draft and target prefer the same token [N]: the acceptance at temperature 0."""
    return (draft_logits_NV.argmax(-1) == top_ids_NK[:, 0]).to(draft_logits_NV.dtype)
