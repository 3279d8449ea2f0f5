"""The losses on truncated distributions, against the whole vocabulary in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.divergences import divergence, names
from trainer.divergences.acceptance import kl_and_acceptance
from trainer.truncated import Truncated, draft_classes, greedy_match, overlap

N, V = 7, 12
BETA = 0.3


def distributions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(N, V, generator=generator, dtype=torch.float64) * 1.5 for _ in range(2)
    )  # type: ignore[return-value]


def truncated(target: Tensor, k: int) -> Truncated:
    top = target.log_softmax(-1).topk(k)
    return Truncated(top.indices, top.values, (1 - top.values.exp().sum(-1)).clamp(min=0))


def loss(name: str, draft: Tensor, target: Truncated) -> Tensor:
    return divergence(name, BETA)(target.classes_PC, draft_classes(draft, target.ids_PK))


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def between(p: Tensor, q: Tensor) -> Tensor:
    return BETA * p + (1 - BETA) * q


# Written a second time, over all tokens.
WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: BETA * kl(p, between(p, q)) + (1 - BETA) * kl(q, between(p, q)),
    "tvd": lambda p, q: 1 - torch.minimum(p, q).sum(-1),
    "acceptance": lambda p, q: -torch.minimum(p, q).sum(-1).log(),
    "kl+acceptance": lambda p, q: BETA * kl(p, q) - (1 - BETA) * torch.minimum(p, q).sum(-1).log(),
}
named = pytest.mark.parametrize("name", WHOLE)


@named
def test_with_the_whole_vocabulary_it_is_the_divergence_itself(name: str) -> None:
    """With K = V nothing is rest."""
    target, draft = distributions()
    expected = WHOLE[name](target.softmax(-1), draft.softmax(-1))
    assert torch.allclose(loss(name, draft, truncated(target, V)), expected, atol=1e-6)


@named
def test_truncated_it_is_the_divergence_of_the_coarser_distributions(name: str) -> None:
    """K classes and one for the rest; never more than over all tokens."""
    target, draft = distributions()
    truth = truncated(target, 4)
    q_top = draft.softmax(-1).gather(-1, truth.ids_PK)
    p = torch.cat([truth.logp_PK.exp(), truth.rest_P[:, None]], 1)
    q = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], 1)
    found = loss(name, draft, truth)
    assert torch.allclose(found, WHOLE[name](p, q))
    assert (found <= WHOLE[name](target.softmax(-1), draft.softmax(-1)) + 1e-9).all()


@named
def test_it_is_zero_at_the_target_and_its_gradient_is_right(name: str) -> None:
    """Zero where p = q; numerical and analytical gradients agree elsewhere."""
    target, draft = distributions()
    truth = truncated(target, 4)
    assert torch.allclose(loss(name, target, truth), torch.zeros(N, dtype=torch.float64), atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda logits: loss(name, logits, truth), draft.requires_grad_()
    )


def test_tvd_plus_has_the_policy_gradient_of_the_normalised_reward() -> None:
    """−Σ_x q(x) A(x) ∇ log q(x), with A the normalised reward 1[p > q] over all positions."""
    target, draft = distributions()
    draft.requires_grad_()
    loss("tvd++", draft, truncated(target, V)).sum().backward()
    p, q = target.softmax(-1), draft.detach().softmax(-1)
    reward = (p > q).double()
    mean = (q * reward).sum() / N
    advantage = (reward - mean) / torch.sqrt((q * (reward - mean) ** 2).sum() / N)
    # ∇_z Σ q A log q with q A held fixed: q A − q Σ q A
    weight = q * advantage
    assert torch.allclose(draft.grad, -(weight - q * weight.sum(-1, keepdim=True)), atol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tvd", "tvd++"])
def test_a_step_along_it_raises_the_acceptance(name: str) -> None:
    """Both are about Σ min(p, q)."""
    target, draft = distributions()
    draft.requires_grad_()
    truth = truncated(target, 6)
    loss(name, draft, truth).mean().backward()
    assert draft.grad is not None
    stepped = draft.detach() - 0.1 * draft.grad
    assert overlap(stepped, truth).mean() > overlap(draft.detach(), truth).mean()


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certainty_is_no_nan(name: str, dtype: torch.dtype) -> None:
    """Targets whose top-k holds all mass; drafts that agree, or are certain of another token."""
    certain = torch.full((2, V), -60.0, dtype=dtype)
    certain[:, 3] = 60
    draft = certain.clone()
    draft[1] = certain[1].roll(1)
    draft.requires_grad_()
    found = loss(name, draft, truncated(certain, 4))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(draft.grad).all()


def test_a_mixture_of_all_of_one_side_is_that_side() -> None:
    """β is the share of KL."""
    target, draft = distributions()
    truth = truncated(target, 4)
    parts = truth.classes_PC, draft_classes(draft, truth.ids_PK)
    assert torch.allclose(kl_and_acceptance(*parts, beta=1.0), loss("forward_kl", draft, truth))
    assert torch.allclose(kl_and_acceptance(*parts, beta=0.0), loss("acceptance", draft, truth))


def test_an_unknown_divergence_is_named() -> None:
    """A recipe that asks for what there isn't fails before it trains."""
    with pytest.raises(ValueError, match=r"'fkl' is none of .*forward_kl, "):
        divergence("fkl", 0.5)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.4])
def test_a_temperature_on_the_whole_vocabulary_is_exact(temperature: float) -> None:
    """p^(1/T), normalised."""
    target, _ = distributions()
    found = truncated(target, V).at(torch.full((N,), temperature, dtype=torch.float64))
    expected = (target / temperature).softmax(-1).gather(-1, found.ids_PK)
    assert torch.allclose(found.logp_PK.exp(), expected, atol=1e-6)


def test_a_temperature_takes_the_rest_along() -> None:
    """Truncated: normalised, unchanged at 1; below 1 the rest is an upper bound."""
    target, _ = distributions()
    truth, half = truncated(target, 4), torch.full((N,), 0.5, dtype=torch.float64)
    assert torch.allclose(truth.at(half * 2).classes_PC, truth.classes_PC)
    colder = truth.at(half)
    assert torch.allclose(colder.classes_PC.sum(-1), torch.ones(N, dtype=torch.float64))
    real_rest = 1 - (target / 0.5).softmax(-1).gather(-1, truth.ids_PK).sum(-1)
    assert (colder.rest_P >= real_rest).all()
    assert (colder.rest_P < truth.rest_P).all()


def test_overlap_is_sigma_min_and_a_lower_bound_when_truncated() -> None:
    """Σ min(p, q) with K = V; less, never more, with fewer."""
    target, draft = distributions()
    exact = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    assert torch.allclose(overlap(draft, truncated(target, V)), exact)
    assert (overlap(draft, truncated(target, 3)) <= exact + 1e-12).all()


def test_greedy_match_compares_first_choices() -> None:
    """1 where both prefer the same token."""
    target, draft = distributions()
    expected = (target.argmax(-1) == draft.argmax(-1)).double()
    assert torch.equal(greedy_match(draft, truncated(target, 4)), expected)
