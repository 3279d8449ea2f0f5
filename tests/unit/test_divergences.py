"""The loss on truncated distributions, against the whole vocabulary in float64."""

import torch

from trainer.divergences import forward_kl, greedy_match, overlap

N, V = 7, 12


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, V, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2))  # type: ignore[return-value]


def truncated(target: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top = target.log_softmax(-1).topk(k)
    return top.indices, top.values, (1 - top.values.exp().sum(-1)).clamp(min=0)


def full_kl(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    p = target.log_softmax(-1)
    return (p.exp() * (p - draft.log_softmax(-1))).sum(-1)


def test_forward_kl_of_the_whole_vocabulary_is_forward_kl() -> None:
    """With K = V nothing is rest."""
    target, draft = distributions()
    assert torch.allclose(forward_kl(draft, *truncated(target, V)), full_kl(target, draft), atol=1e-9)


def test_forward_kl_of_the_top_k_is_the_kl_of_the_coarser_distributions() -> None:
    """K classes and one for the rest; never more than the whole."""
    target, draft = distributions()
    ids, logp, rest = truncated(target, 4)
    q_top = draft.softmax(-1).gather(-1, ids)
    p = torch.cat([logp.exp(), rest[:, None]], 1)
    q = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], 1)
    found = forward_kl(draft, ids, logp, rest)
    assert torch.allclose(found, (p * (p.log() - q.log())).sum(-1))
    assert (found <= full_kl(target, draft) + 1e-9).all()


def test_forward_kl_is_zero_at_the_target_and_its_gradient_is_right() -> None:
    """Zero where p = q; numerical and analytical gradients agree elsewhere."""
    target, draft = distributions()
    parts = truncated(target, 4)
    assert torch.allclose(forward_kl(target, *parts), torch.zeros(N, dtype=torch.float64), atol=1e-9)
    assert torch.autograd.gradcheck(lambda logits: forward_kl(logits, *parts), draft.requires_grad_())


def test_no_rest_mass_is_no_nan() -> None:
    """Greedy-like targets whose top-k holds everything, and a draft that agrees, stay finite."""
    certain = torch.full((1, V), -60.0, dtype=torch.float64)
    certain[0, 3] = 60
    logits = certain.clone().requires_grad_()
    forward_kl(logits, *truncated(certain, 4)).sum().backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_overlap_is_sigma_min_and_a_lower_bound_when_truncated() -> None:
    """Σ min(p, q) with K = V; less, never more, with fewer."""
    target, draft = distributions()
    exact = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    assert torch.allclose(overlap(draft, *truncated(target, V)[:2]), exact)
    assert (overlap(draft, *truncated(target, 3)[:2]) <= exact + 1e-12).all()


def test_greedy_match_compares_first_choices() -> None:
    """1 where both prefer the same token."""
    target, draft = distributions()
    expected = (target.argmax(-1) == draft.argmax(-1)).double()
    assert torch.equal(greedy_match(draft, truncated(target, 4)[0]), expected)
