"""Exactness by enumeration: what is emitted has the target's distribution.

The limit is 1e-6 in total variation, and nothing is sampled. The serving functions take
their randomness as uniforms. Bisection finds the measure of the uniforms that lead to each
outcome, so the functions are measured as black boxes, as they serve.

Legend: V vocabulary, G drafted tokens, C = V^G draft sequences, all in one batch.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.drafters.model import propose as propose_tokens
from decoder.verification.chain import Chains, verify_block
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Sampling, Uniforms, probabilities, sample
from decoder.verification.tree_shape import chain_shape
from decoder.verification.verify import verify
from lab.enumeration import NEGLIGIBLE, boundary, outcome_masses
from tests.tabular import TableModel

V, G, PROMPT = 4, 3, [1, 2]
LIMIT = 1e-6
SETTINGS = {
    "plain": (1.0, 0, 1.0),
    "cold": (0.6, 0, 1.0),
    "top_k": (1.0, 2, 1.0),
    "top_p": (0.9, 0, 0.7),
    "all three": (1.3, 3, 0.8),
    "greedy": (0.0, 0, 1.0),
}
# Float64 logits run through torch's operations, as on a GPU; float32 on a CPU is compiled.
either = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["torch", "compiled"])
Verifier = Callable[[Tensor, Proposal, Sampling, Tensor, Tensor], Verification]


def reference_distribution(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> np.ndarray:
    """Temperature, top-k, top-p written a second time, token by token."""
    if temperature == 0:
        return np.eye(V)[int(np.argmax(logits))]
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(V), key=lambda v: -weights[v])[: top_k or V]
    total = sum(weights[v] for v in order)
    inside, before = [], 0.0
    for v in order:
        if before < top_p:
            inside.append(v)
        before += weights[v] / total
    out = np.zeros(V)
    out[inside] = weights[inside] / weights[inside].sum()
    return out


def target_joint(target: TableModel, setting: tuple[float, int, float], length: int) -> np.ndarray:
    """The target's own distribution over continuations of `length` tokens, [V] * length."""
    joint = np.zeros((V,) * length)
    for tokens in itertools.product(range(V), repeat=length):
        steps = [
            reference_distribution(target.logits([*PROMPT, *tokens[:i]]), *setting)[tokens[i]]
            for i in range(length)
        ]
        joint[tokens] = np.prod(steps)
    return joint


def enumerate_drafts(
    draft: TableModel, sampling: Sampling, drafted: int
) -> tuple[Proposal, Tensor]:
    """Every possible draft as one sequence of a real proposal, and its probability [C].

    The probability is measured through `sample`.
    """
    sequences = torch.tensor(list(itertools.product(range(V), repeat=G)))
    count = len(sequences)
    probability = torch.ones(count, dtype=torch.float64)
    uniform_CG = torch.zeros(count, G, dtype=torch.float64)
    if sampling.all_greedy:  # nothing is drawn: one draft, whatever the uniforms
        proposal = propose(draft, sampling, uniform_CG, drafted)
        return proposal, (proposal.tokens_BN == sequences).all(1).to(torch.float64)
    for g in range(G):
        proposal = propose(draft, sampling, uniform_CG, drafted)
        masses = outcome_masses(lambda u, p=proposal.probs_BQV[:, g]: sample(p, u), count, V)
        wanted = sequences[:, g : g + 1]
        mass = masses.gather(1, wanted).squeeze(1)
        uniform_CG[:, g] = masses.cumsum(1).gather(1, wanted).squeeze(1) - mass / 2
        probability *= mass
    proposal = propose(draft, sampling, uniform_CG, drafted)
    possible = probability > NEGLIGIBLE
    assert torch.equal(proposal.tokens_BN[possible], sequences[possible])
    return proposal, probability


def propose(draft: TableModel, sampling: Sampling, uniform_CG: Tensor, drafted: int) -> Proposal:
    count = len(uniform_CG)
    return propose_tokens(
        draft,
        slice(0, count),
        torch.tensor([PROMPT] * count),
        torch.full((count,), len(PROMPT)),
        torch.zeros(count, dtype=torch.long),
        len(PROMPT),
        torch.full((count,), drafted),
        chain_shape(G),
        sampling,
        uniform_CG,
    )


def target_logits(target: TableModel, tokens_BG: Tensor) -> Tensor:
    """The target's, after the prompt and after every drafted token: [B, T, V]."""
    slots, count = slice(0, len(tokens_BG)), len(tokens_BG)
    target.encode(
        slots,
        torch.tensor([PROMPT[:-1]] * count),
        torch.zeros(count, dtype=torch.long),
        len(PROMPT) - 1,
    )
    inputs_BT = torch.cat([torch.full((count, 1), PROMPT[-1]), tokens_BG], 1)
    return target.forward(
        slots, inputs_BT, torch.full((count,), len(PROMPT) - 1), len(PROMPT) + tokens_BG.shape[1]
    )


def emitted_joint(
    verifier: Verifier,
    target: TableModel,
    draft: TableModel,
    setting: tuple[float, int, float],
    drafted: int,
) -> np.ndarray:
    """The distribution over the first `drafted` + 1 tokens that drafting and verifying emit.

    A step that emits fewer tokens is continued by the target's own distribution, as the
    next steps would continue it if they were exact.
    """
    count = V**G
    temperature, top_k, top_p = setting
    sampling = Sampling.of([temperature] * count, [top_k] * count, [top_p] * count, V)
    proposal, probability_C = enumerate_drafts(draft, sampling, drafted)
    logits_BTV = target_logits(target, proposal.tokens_BN)

    def run(accept_CG: Tensor, emit_C: Tensor) -> Verification:
        return verifier(logits_BTV, proposal, sampling, accept_CG, emit_C)

    anything_C, never = torch.full((count,), 0.5, dtype=torch.float64), 1 - 2.0**-53
    pass_CG = torch.zeros(count, drafted, dtype=torch.float64)
    for at in range(drafted):

        def passes(u: Tensor, at: int = at) -> Tensor:
            """Where all tokens before it pass, and none after it."""
            trial_CG = torch.zeros(count, G, dtype=torch.float64)
            trial_CG[:, at], trial_CG[:, at + 1 :] = u, never
            return run(trial_CG, anything_C).accepted_B > at

        pass_CG[:, at] = boundary(passes, count)
    joint = np.zeros((V,) * (drafted + 1))
    for passed in itertools.product([True, False], repeat=drafted):
        passed_G = torch.tensor(passed, dtype=torch.bool)
        accept_CG = torch.zeros(count, G, dtype=torch.float64)
        accept_CG[:, :drafted] = torch.where(passed_G, 0.0, never)
        mass_C = probability_C * torch.where(passed_G, pass_CG, 1 - pass_CG).prod(1)
        accepted_C = run(accept_CG, anything_C).accepted_B.tolist()
        emit_CV = outcome_masses(lambda u, a=accept_CG: run(a, u).next_B, count, V)
        for c in range(count):
            if mass_C[c] > NEGLIGIBLE:
                accepted = proposal.tokens_BN[c, : accepted_C[c]].tolist()
                for v in range(V):
                    _spread(
                        joint, target, setting, [*accepted, v], float(mass_C[c] * emit_CV[c, v])
                    )
    return joint


def _spread(
    joint: np.ndarray,
    target: TableModel,
    setting: tuple[float, int, float],
    tokens: list[int],
    mass: float,
) -> None:
    if mass == 0:
        return
    if len(tokens) == joint.ndim:
        joint[tuple(tokens)] += mass
        return
    following = reference_distribution(target.logits([*PROMPT, *tokens]), *setting)
    for v in range(V):
        _spread(joint, target, setting, [*tokens, v], mass * following[v])


def total_variation(
    verifier: Verifier,
    setting: tuple[float, int, float],
    drafted: int,
    dtype: torch.dtype = torch.float64,
) -> float:
    target = TableModel(V, 0, V**G, dtype=dtype)
    draft = TableModel(V, 100, V**G, dtype=dtype)
    emitted = emitted_joint(verifier, target, draft, setting, drafted)
    return float(np.abs(emitted - target_joint(target, setting, drafted + 1)).sum() / 2)


def always_accepts(
    logits_BTV: Tensor, proposal: Proposal, sampling: Sampling, u: Tensor, e: Tensor
) -> Verification:
    """A mutant: accepts every drafted token."""
    return verify(logits_BTV, proposal, sampling, u * 0 - 1, e)


def skips_residual(
    logits_BTV: Tensor, proposal: Proposal, sampling: Sampling, u: Tensor, e: Tensor
) -> Verification:
    """A mutant: after a rejection it draws from the target as if nothing had been rejected."""
    honest = verify(logits_BTV, proposal, sampling, u, e)
    row_B = torch.arange(len(honest.accepted_B))
    next_B = sample(probabilities(logits_BTV, sampling)[row_B, honest.accepted_B], e)
    return replace(honest, next_B=next_B)


def greedily_accepts(
    logits_BTV: Tensor, proposal: Proposal, sampling: Sampling, u: Tensor, e: Tensor
) -> Verification:
    """A mutant of the greedy path: compares the draft with itself."""
    honest = verify(logits_BTV, proposal, sampling, u, e)
    next_B = logits_BTV[torch.arange(len(u)), proposal.drafted_B].argmax(-1)
    return replace(honest, accepted_B=proposal.drafted_B, next_B=next_B)


@either
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_emitted_distribution_is_the_targets(
    setting: tuple[float, int, float], dtype: torch.dtype
) -> None:
    """Draft, verify and emit give the target's distribution over the next γ + 1 tokens."""
    assert total_variation(verify, setting, G, dtype) <= LIMIT


@either
@pytest.mark.parametrize("setting", ["plain", "all three", "greedy"])
@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_sequences_that_draft_less_than_their_batch_are_exact(
    drafted: int, setting: str, dtype: torch.dtype
) -> None:
    """Padding after a sequence's own draft changes nothing."""
    assert total_variation(verify, SETTINGS[setting], drafted, dtype) <= LIMIT


@either
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_plain_step_draws_from_the_target(
    setting: tuple[float, int, float], dtype: torch.dtype
) -> None:
    """Without a draft the next token has the target's distribution and its probability.

    The proposal then has no columns.
    """
    target = TableModel(V, 0, dtype=dtype)
    sampling = Sampling.of(*([value] for value in setting), V)  # type: ignore[arg-type]
    proposal = Proposal.empty(1, 0, V, "cpu", sampling.all_greedy)
    logits_BTV = target_logits(target, proposal.tokens_BN)
    run = lambda u: verify(
        logits_BTV, proposal, sampling, torch.zeros(1, 0, dtype=torch.float64), u
    )
    expected = reference_distribution(target.logits(PROMPT), *setting)
    assert (
        np.abs(outcome_masses(lambda u: run(u).next_B, 1, V)[0].numpy() - expected).sum() / 2
        <= LIMIT
    )
    for uniform in np.linspace(0, 1, 50, endpoint=False):
        result = run(torch.tensor([uniform], dtype=torch.float64))
        assert result.next_p_B.item() == pytest.approx(expected[result.next_B.item()], abs=LIMIT)
        assert (result.accepted_B.item(), result.overlap_B.item()) == (0, 0)


@either
@pytest.mark.parametrize(
    ("mutant", "setting"),
    [(always_accepts, "plain"), (skips_residual, "plain"), (greedily_accepts, "greedy")],
)
def test_enumeration_catches_mutants(mutant: Verifier, setting: str, dtype: torch.dtype) -> None:
    """A verifier that always accepts, or skips the residual, is far outside the limit."""
    assert total_variation(mutant, SETTINGS[setting], G, dtype) > 1e-2


@either
def test_greedy_emits_the_targets_tokens_whatever_is_drafted(dtype: torch.dtype) -> None:
    """Every draft of every length: all emitted tokens are the target's most likely ones."""
    target = TableModel(V, 5, V**G, dtype=dtype)
    tokens_BG = torch.tensor(list(itertools.product(range(V), repeat=G)))
    best: list[int] = []
    for _ in range(G + 1):
        best.append(int(target.logits([*PROMPT, *best]).argmax()))
    logits_BTV = target_logits(target, tokens_BG)
    for drafted in range(G + 1):
        result = verify(logits_BTV, *_greedy(tokens_BG, drafted))
        for tokens, accepted, following in zip(
            tokens_BG.tolist(), result.accepted_B, result.next_B, strict=True
        ):
            agreed = [i for i in range(drafted) if tokens[: i + 1] == best[: i + 1]]
            assert accepted == len(agreed)
            assert following == best[len(agreed)]


@either
def test_greedy_sequences_are_verified_alike_in_greedy_and_mixed_batches(
    dtype: torch.dtype,
) -> None:
    """The shortcut for a batch that is all greedy gives the result of the general path."""
    tokens_BG = torch.tensor([*itertools.product(range(V), repeat=G), [0] * G])
    logits_BTV = target_logits(TableModel(V, 5, V**G + 1, dtype=dtype), tokens_BG)
    proposal, sampling, accept_BG, emit_B = _greedy(tokens_BG, G)
    short = verify(logits_BTV, proposal, sampling, accept_BG, emit_B)
    one_hot_BGV = torch.nn.functional.one_hot(tokens_BG, V).double()
    mixed = Sampling.of([*[0.0] * V**G, 1.0], [0] * (V**G + 1), [1.0] * (V**G + 1), V)
    long = verify(logits_BTV, replace(proposal, probs_BQV=one_hot_BGV), mixed, accept_BG, emit_B)
    for field in ("accepted_B", "next_B", "next_p_B", "overlap_B"):
        assert torch.equal(
            getattr(short, field)[:-1].double(), getattr(long, field)[:-1].double()
        ), field


def _greedy(tokens_BG: Tensor, drafted: int) -> tuple[Proposal, Sampling, Tensor, Tensor]:
    """A batch of greedy sequences that draft `tokens_BG`, as arguments of `verify`."""
    count = len(tokens_BG)
    proposal = replace(
        Proposal.empty(count, G, V, "cpu", greedy=True),
        tokens_BN=tokens_BG,
        drafted_B=torch.full((count,), drafted),
    )
    half_BG = torch.full((count, G), 0.5, dtype=torch.float64)
    return (
        proposal,
        Sampling.of([0.0] * count, [0] * count, [1.0] * count, V),
        half_BG,
        half_BG[:, 0],
    )


def test_draft_equal_to_the_target_is_always_accepted() -> None:
    """With p = q nothing is rejected, and an empty residual never decides a token."""
    probs = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2])
    almost_one = torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)
    chains = Chains(torch.tensor([[1]]), probs[:, :1], torch.tensor([1]))
    result = verify_block(probs, chains, Uniforms(almost_one, almost_one[0]))
    assert result.accepted_B.tolist() == [1]
    assert result.overlap_B.tolist() == [1.0]


@either
def test_samples_agree_with_the_target_by_chi_square(dtype: torch.dtype) -> None:
    """The second check, by sampling: 20,000 first tokens against p, at a level of 1e-6."""
    target, draft = TableModel(V, 7), TableModel(V, 8)
    count = 20_000
    rng = np.random.default_rng(0)
    p = torch.from_numpy(target.logits(PROMPT)).to(dtype).softmax(-1)
    q = torch.from_numpy(draft.logits(PROMPT)).to(dtype).softmax(-1)
    uniform = torch.from_numpy(rng.random((count, 3)))
    tokens = sample(q.expand(count, V), uniform[:, 0])
    q_BGV = q.expand(count, 1, V)
    proposal = Proposal(tokens[:, None], q_BGV, [q_BGV.log()], torch.ones(count, dtype=torch.long))
    sampling = Sampling.of([1.0] * count, [0] * count, [1.0] * count, V)
    result = verify(p.log().expand(count, 2, V), proposal, sampling, uniform[:, 1:2], uniform[:, 2])
    first = torch.where(result.accepted_B > 0, tokens, result.next_B)
    observed = np.bincount(first.numpy(), minlength=V)
    expected = count * p.double().numpy()
    assert (
        (observed - expected) ** 2 / expected
    ).sum() < 30.7  # χ² with 3 degrees of freedom, 1e-6


@either
def test_a_draft_of_nan_logits_stays_exact(dtype: torch.dtype) -> None:
    """NaN logits become some distribution, and verification corrects any distribution."""

    class Broken(TableModel):
        def logits(self, context: list[int]) -> np.ndarray:  # type: ignore[override]
            return np.full(V, np.nan)

    target = TableModel(V, 3, V**G, dtype=dtype)
    emitted = emitted_joint(verify, target, Broken(V, 0, V**G, dtype=dtype), SETTINGS["plain"], G)
    assert np.abs(emitted - target_joint(target, SETTINGS["plain"], G + 1)).sum() / 2 <= LIMIT
