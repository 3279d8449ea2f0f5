"""Lossy decoding by enumeration: lenient sequences emit their closed form.

Exact sequences of the same batch emit the target's distribution. As in `test_exactness.py`,
nothing is sampled, and both implementations are measured as black boxes.

Legend: B sequences, V vocabulary, G drafted tokens, C = V^G draft sequences, all in one batch.
"""

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.verification.lenience import LenientAcceptance
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Sampling, probabilities, sample
from decoder.verification.verify import verify
from online.messages import Lenience
from tests.exactness.test_exactness import (
    LIMIT,
    PROMPT,
    SETTINGS,
    G,
    V,
    Verifier,
    either,
    emitted_joint,
    reference_distribution,
    target_joint,
)
from tests.tabular import TableModel

LENIENCES = [Lenience("lin", 0.6), Lenience("sq", 0.7), Lenience("exp", 0.5)]
each_function = pytest.mark.parametrize(
    "lenience", LENIENCES, ids=[one.function for one in LENIENCES]
)
Setting = tuple[float, int, float]


def closed_form(
    target: TableModel, draft: TableModel, setting: Setting, lenience: Lenience
) -> np.ndarray:
    """The joint distribution that a step of G drafted tokens emits, [V] * (G + 1).

    Where it emits fewer tokens, the target continues.
    """
    joint = np.zeros((V,) * (G + 1))
    for tokens in itertools.product(range(V), repeat=G + 1):
        contexts = [[*PROMPT, *tokens[:i]] for i in range(G + 1)]
        p = [reference_distribution(target.logits(context), *setting) for context in contexts]
        q = [reference_distribution(draft.logits(context), *setting) for context in contexts[:G]]
        own = [float(p[i][token]) for i, token in enumerate(tokens)]
        reached = 1.0
        for i, token in enumerate(tokens[:G]):
            kept, residual = np.minimum(q[i], due(p[i], lenience)), np.maximum(p[i] - q[i], 0)
            if (rejected := 1 - kept.sum()) > 1e-12:
                joint[tokens] += (
                    reached * rejected * residual[token] / residual.sum() * np.prod(own[i + 1 :])
                )
            reached *= kept[token]
        joint[tokens] += reached * own[G]
    return joint


def due(p: np.ndarray, lenience: Lenience) -> np.ndarray:
    """The paper's functions."""
    epsilon = lenience.epsilon
    return {"lin": p / epsilon, "sq": p / epsilon**2, "exp": p**epsilon}[lenience.function]


def leniently(*lenience: Lenience | None) -> Verifier:
    """`verify` for sequences that ask for each `lenience` in turn."""
    return partial(verify, lenient=LenientAcceptance.of(list(lenience) * (V**G // len(lenience))))


def models(dtype: torch.dtype) -> tuple[TableModel, TableModel]:
    return TableModel(V, 0, V**G, dtype=dtype), TableModel(V, 100, V**G, dtype=dtype)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(one - other).sum() / 2)


def off(verifier: Verifier, setting: Setting, lenience: Lenience, dtype: torch.dtype) -> float:
    """The distance between what is emitted and the closed form."""
    target, draft = models(dtype)
    return apart(
        emitted_joint(verifier, target, draft, setting, G),
        closed_form(target, draft, setting, lenience),
    )


# ── distributions ──


@either
@each_function
@pytest.mark.parametrize("setting", ["plain", "cold", "all three"])
def test_a_lenient_sequence_emits_the_closed_form(
    setting: str, lenience: Lenience, dtype: torch.dtype
) -> None:
    """min(q, f(p)) plus the rejected mass times the residual, at every position."""
    target, draft = models(dtype)
    emitted = emitted_joint(leniently(lenience), target, draft, SETTINGS[setting], G)
    assert apart(emitted, closed_form(target, draft, SETTINGS[setting], lenience)) <= LIMIT
    assert apart(emitted, target_joint(target, SETTINGS[setting], G + 1)) > 1e-3


@either
@each_function
def test_the_additional_acceptance_is_the_distance_from_the_target(
    lenience: Lenience, dtype: torch.dtype
) -> None:
    """For the first token: ½ Σ |e − p| = Σ min(q, f(p)) − Σ min(q, p)."""
    target, draft = models(dtype)
    p, q = (
        reference_distribution(model.logits(PROMPT), *SETTINGS["plain"])
        for model in (target, draft)
    )
    emitted = emitted_joint(leniently(lenience), target, draft, SETTINGS["plain"], G).sum((1, 2, 3))
    gained = float((np.minimum(q, due(p, lenience)) - np.minimum(q, p)).sum())
    assert apart(emitted, p) == pytest.approx(gained, abs=LIMIT)
    assert gained > 1e-3


@either
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_epsilon_1_is_exact(setting: Setting, dtype: torch.dtype) -> None:
    """For every function, and where other sequences of the batch are lenient."""
    assert LenientAcceptance.of([None, *(Lenience(one.function, 1.0) for one in LENIENCES)]) is None
    ones_C = torch.ones(V**G, dtype=torch.float64)
    target, draft = models(dtype)
    emitted = emitted_joint(
        partial(verify, lenient=LenientAcceptance(ones_C, ones_C)), target, draft, setting, G
    )
    assert apart(emitted, target_joint(target, setting, G + 1)) <= LIMIT


# ── batches of both kinds ──


def beside(
    own: Lenience | None,
    other: Lenience | None,
    logits_BTV: Tensor,
    proposal: Proposal,
    sampling: Sampling,
    accept_uniform_BG: Tensor,
    emit_uniform_B: Tensor,
) -> Verification:
    """`verify` of sequences that ask for `own`, each next to a copy that asks for `other`."""
    twice = lambda tensor: tensor.repeat_interleave(2, 0)
    doubled = Proposal(
        twice(proposal.tokens_BN), twice(proposal.probs_BQV), [], twice(proposal.drafted_B)
    )
    members = [i for i in range(len(logits_BTV)) for _ in range(2)]
    drawn = twice(accept_uniform_BG), twice(emit_uniform_B)
    lenient = LenientAcceptance.of([own, other] * len(logits_BTV))
    result = verify(twice(logits_BTV), doubled, sampling.select(members), *drawn, lenient)
    return Verification(*(getattr(result, field.name)[::2] for field in fields(result)))


@either
@each_function
@pytest.mark.parametrize("setting", ["plain", "all three"])
def test_exact_and_lenient_sequences_share_a_batch(
    setting: str, lenience: Lenience, dtype: torch.dtype
) -> None:
    """Each sequence emits the target's distribution, or its closed form."""
    target, draft = models(dtype)
    exact = emitted_joint(partial(beside, None, lenience), target, draft, SETTINGS[setting], G)
    assert apart(exact, target_joint(target, SETTINGS[setting], G + 1)) <= LIMIT
    assert off(partial(beside, lenience, None), SETTINGS[setting], lenience, dtype) <= LIMIT


@either
@pytest.mark.parametrize("top_k", [0, 3])
def test_lenient_neighbours_change_no_bit_of_exact_sequences(
    dtype: torch.dtype, top_k: int
) -> None:
    """Greedy sequences included."""
    torch.manual_seed(0)
    count, size = 64, 50
    logits_BTV = 2 * torch.randn(count, G + 1, size, dtype=dtype)
    own = Sampling.of([1.0, 0.0, 0.5, 2.0] * 16, [top_k] * count, [1.0] * count, size)
    q_BGV = probabilities(logits_BTV[:, :-1] + torch.randn(count, G, size, dtype=dtype), own)
    tokens_BG = sample(q_BGV, torch.rand(count, G, dtype=torch.float64))
    proposal = Proposal(tokens_BG, q_BGV, [], torch.arange(count) % (G + 1))
    drawn = torch.rand(count, G, dtype=torch.float64), torch.rand(count, dtype=torch.float64)
    alone = verify(logits_BTV, proposal, own, *drawn)
    for lenience in LENIENCES:
        together = beside(None, lenience, logits_BTV, proposal, own, *drawn)
        for field in fields(alone):
            assert torch.equal(getattr(alone, field.name), getattr(together, field.name)), (
                field.name
            )


# ── mutants ──


def always_accepts(
    logits_BTV: Tensor, proposal: Proposal, sampling: Sampling, u: Tensor, e: Tensor
) -> Verification:
    """Accepts every drafted token."""
    return leniently(LENIENCES[0])(logits_BTV, proposal, sampling, u * 0 - 1, e)


def skips_residual(
    logits_BTV: Tensor, proposal: Proposal, sampling: Sampling, u: Tensor, e: Tensor
) -> Verification:
    """Draws from the target after a rejection."""
    honest = leniently(LENIENCES[0])(logits_BTV, proposal, sampling, u, e)
    probs_BV = probabilities(logits_BTV, sampling)[torch.arange(len(u)), honest.accepted_B]
    return replace(honest, next_B=sample(probs_BV, e))


@either
@pytest.mark.parametrize(
    "mutant",
    [
        always_accepts,
        skips_residual,
        verify,
        leniently(Lenience("sq", 0.6)),
        leniently(Lenience("exp", 0.6)),
        leniently(LENIENCES[0], None),
    ],
    ids=["accepts", "no residual", "exact", "squared", "raised", "every other sequence"],
)
def test_enumeration_catches_mutants(mutant: Verifier, dtype: torch.dtype) -> None:
    """Anything but p / ε in every sequence, or no residual, is far from the closed form."""
    assert off(mutant, SETTINGS["plain"], LENIENCES[0], dtype) > 1e-2


@either
def test_enumeration_catches_a_neighbours_lenience(dtype: torch.dtype) -> None:
    """Sequences that are verified with their neighbour's lenience are not exact."""
    target, draft = models(dtype)
    emitted = emitted_joint(
        partial(beside, LENIENCES[0], None), target, draft, SETTINGS["plain"], G
    )
    assert apart(emitted, target_joint(target, SETTINGS["plain"], G + 1)) > 1e-2


# ── corners ──


def first(
    p: Sequence[float], q: Sequence[float], token: int, lenience: Lenience, dtype: torch.dtype
) -> Verification:
    """The result for one drafted token, under the largest uniforms."""
    last = torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)
    logits_BTV = torch.tensor([[p, p]], dtype=dtype).log()
    proposal = Proposal(
        torch.tensor([[token]]), torch.tensor([[q]], dtype=dtype), [], torch.tensor([1])
    )
    return verify(
        logits_BTV,
        proposal,
        Sampling.of([1.0], [0], [1.0], len(p)),
        last,
        last[0],
        LenientAcceptance.of([lenience]),
    )


@either
@pytest.mark.parametrize("epsilon", [0.5, 1e-3, 1e-200, 5e-324])
@each_function
def test_what_the_target_rules_out_stays_out(
    lenience: Lenience, epsilon: float, dtype: torch.dtype
) -> None:
    """f(0) = 0, however small ε is, and the emitted token is possible."""
    result = first(
        [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], 2, replace(lenience, epsilon=epsilon), dtype
    )
    assert result.accepted_B.tolist() == [0]
    assert result.next_B.item() in (0, 1)


@either
@pytest.mark.parametrize("epsilon", [1e-3, 1e-200, 5e-324])
@each_function
def test_with_a_tiny_epsilon_the_draft_is_always_accepted(
    lenience: Lenience, epsilon: float, dtype: torch.dtype
) -> None:
    """Where f(p) ≥ q everywhere nothing is rejected."""
    result = first([0.01, 0.99], [0.99, 0.01], 0, replace(lenience, epsilon=epsilon), dtype)
    assert result.accepted_B.tolist() == [1]


@either
@each_function
def test_a_draft_equal_to_the_target_is_always_accepted(
    lenience: Lenience, dtype: torch.dtype
) -> None:
    """An empty residual never decides a token."""
    result = first([0.5, 0.5], [0.5, 0.5], 1, lenience, dtype)
    assert (result.accepted_B.tolist(), result.overlap_B.tolist()) == ([1], [pytest.approx(1)])
