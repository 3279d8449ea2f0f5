"""Exactness by enumeration: the serving functions' output distribution is the target's, to 1e-6 in total variation.

Nothing is sampled. The serving functions take their randomness as uniforms; the lengths of the intervals of uniforms
that lead to each outcome are found by bisection, so the functions are measured as black boxes, as they serve.

Legend: V vocabulary, G drafted tokens, C = V^G draft sequences, all in one batch.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.drafters.chain import Proposal, propose_chain
from decoder.sampling import Sampling, probabilities, sample
from decoder.verify import Verdict, verify
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
Verifier = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]


def reference_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, top-k, top-p written a second time, token by token."""
    if temperature == 0:
        return np.eye(V)[int(np.argmax(logits))]
    weights = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(V), key=lambda v: -weights[v])[: top_k or V]
    total = sum(weights[v] for v in order)
    kept, before = [], 0.0
    for v in order:
        if before < top_p:
            kept.append(v)
        before += weights[v] / total
    out = np.zeros(V)
    out[kept] = weights[kept] / weights[kept].sum()
    return out


def target_joint(target: TableModel, setting: tuple[float, int, float], length: int) -> np.ndarray:
    """The target's own distribution over continuations of `length` tokens, [V] * length."""
    joint = np.zeros((V,) * length)
    for tokens in itertools.product(range(V), repeat=length):
        steps = [
            reference_distribution(target.logits([*PROMPT, *tokens[:i]]), *setting)[tokens[i]] for i in range(length)
        ]
        joint[tokens] = np.prod(steps)
    return joint


def boundary(reaches: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Per row the largest uniform for which `reaches` holds, by bisection of [0, 1)."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(55):
        middle = (low + high) / 2
        holds = reaches(middle)
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return (low + high) / 2


def outcome_masses(draw: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Measure of the uniforms that `draw` maps to each token, [count, V]. `draw` is non-decreasing in its uniform."""
    edges = [boundary(lambda u, v=v: draw(u) <= v, count) for v in range(V)]
    return torch.diff(torch.stack([torch.zeros(count, dtype=torch.float64), *edges], 1), dim=1)


def enumerate_drafts(draft: TableModel, sampling: Sampling, drafted: int) -> tuple[Proposal, Tensor]:
    """Every draft sequence as one row of a real proposal, and its probability [C] measured through `sample`."""
    sequences = torch.tensor(list(itertools.product(range(V), repeat=G)))
    count = len(sequences)
    probability = torch.ones(count, dtype=torch.float64)
    uniform_CG = torch.zeros(count, G, dtype=torch.float64)
    for g in range(G):
        proposal = propose(draft, sampling, uniform_CG, drafted)
        masses = outcome_masses(lambda u, p=proposal.probs_BGV[:, g]: sample(p, u), count)
        wanted = sequences[:, g : g + 1]
        mass = masses.gather(1, wanted).squeeze(1)
        uniform_CG[:, g] = masses.cumsum(1).gather(1, wanted).squeeze(1) - mass / 2
        probability *= mass
    proposal = propose(draft, sampling, uniform_CG, drafted)
    possible = probability > 1e-12  # bisection leaves tokens of no mass 2^-55 of it
    assert torch.equal(proposal.tokens_BG[possible], sequences[possible])
    return proposal, probability


def propose(draft: TableModel, sampling: Sampling, uniform_CG: Tensor, drafted: int) -> Proposal:
    count = len(uniform_CG)
    return propose_chain(
        draft,
        slice(0, count),
        torch.tensor([PROMPT] * count),
        torch.full((count,), len(PROMPT)),
        torch.zeros(count, dtype=torch.long),
        len(PROMPT),
        torch.full((count,), drafted),
        G,
        sampling,
        uniform_CG,
    )


def emitted_joint(
    verifier: Verifier, target: TableModel, draft: TableModel, setting: tuple[float, int, float], drafted: int
) -> np.ndarray:
    """The distribution over the first `drafted` + 1 tokens that drafting and verifying emit.

    A step that emits fewer is continued by the target's own distribution, as the next steps would if they were exact.
    """
    count = V**G
    temperature, top_k, top_p = setting
    sampling = Sampling.of([temperature] * count, [top_k] * count, [top_p] * count, V)
    proposal, probability_C = enumerate_drafts(draft, sampling, drafted)
    target.forward(slice(0, count), torch.tensor([PROMPT[:-1]] * count), torch.zeros(count, dtype=torch.long), 1)
    inputs_BT = torch.cat([torch.full((count, 1), PROMPT[-1]), proposal.tokens_BG], 1)
    starts_B = torch.full((count,), len(PROMPT) - 1)
    logits_BTV = target.forward(slice(0, count), inputs_BT, starts_B, len(PROMPT) + G)
    probs_BTV = probabilities(logits_BTV, sampling)

    def run(accept_CG: Tensor, emit_C: Tensor) -> Verdict:
        return verifier(probs_BTV, proposal.probs_BGV, proposal.tokens_BG, proposal.drafted_B, accept_CG, emit_C)

    anything_C = torch.full((count,), 0.5, dtype=torch.float64)
    always_CG = torch.zeros(count, G, dtype=torch.float64)
    never = 1 - 2.0**-53
    reach_C = probability_C.clone()
    joint = np.zeros((V,) * (drafted + 1))
    for accepted in range(drafted + 1):
        pass_C = torch.zeros(count, dtype=torch.float64)
        accept_CG = always_CG.clone()
        if accepted < drafted:

            def passes(u: Tensor, at: int = accepted) -> Tensor:
                trial_CG = always_CG.clone()
                trial_CG[:, at] = u
                return run(trial_CG, anything_C).accepted_B > at

            pass_C = boundary(passes, count)
            accept_CG[:, accepted] = never
        stop_C = reach_C * (1 - pass_C)
        emit_CV = outcome_masses(lambda u, a=accept_CG: run(a, u).next_B, count)
        for c in range(count):
            if stop_C[c] > 1e-15:
                kept = proposal.tokens_BG[c, :accepted].tolist()
                for v in range(V):
                    _spread(joint, target, setting, [*kept, v], float(stop_C[c] * emit_CV[c, v]))
        reach_C = reach_C * pass_C
    return joint


def _spread(
    joint: np.ndarray, target: TableModel, setting: tuple[float, int, float], tokens: list[int], mass: float
) -> None:
    if mass == 0:
        return
    if len(tokens) == joint.ndim:
        joint[tuple(tokens)] += mass
        return
    following = reference_distribution(target.logits([*PROMPT, *tokens]), *setting)
    for v in range(V):
        _spread(joint, target, setting, [*tokens, v], mass * following[v])


def total_variation(verifier: Verifier, setting: tuple[float, int, float], drafted: int, seed: int = 0) -> float:
    target, draft = TableModel(V, seed, V**G), TableModel(V, seed + 100, V**G)
    emitted = emitted_joint(verifier, target, draft, setting, drafted)
    return float(np.abs(emitted - target_joint(target, setting, drafted + 1)).sum() / 2)


def always_accepts(p_BTV: Tensor, q_BGV: Tensor, tokens_BG: Tensor, drafted_B: Tensor, u: Tensor, e: Tensor) -> Verdict:
    """A mutant: keeps every drafted token."""
    return verify(p_BTV, q_BGV, tokens_BG, drafted_B, u * 0 - 1, e)


def skips_residual(p_BTV: Tensor, q_BGV: Tensor, tokens_BG: Tensor, drafted_B: Tensor, u: Tensor, e: Tensor) -> Verdict:
    """A mutant: after a rejection it draws from the target as if nothing had been rejected."""
    honest = verify(p_BTV, q_BGV, tokens_BG, drafted_B, u, e)
    row_B = torch.arange(len(drafted_B))
    return Verdict(honest.accepted_B, sample(p_BTV[row_B, honest.accepted_B], e), honest.overlap_B)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_emitted_distribution_is_the_targets(setting: tuple[float, int, float]) -> None:
    """Draft, verify and emit together give exactly the target's distribution over the next γ + 1 tokens."""
    assert total_variation(verify, setting, drafted=G) <= LIMIT


@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_rows_that_draft_less_than_their_batch_are_exact(drafted: int) -> None:
    """Padding behind a row's own draft changes nothing."""
    assert total_variation(verify, SETTINGS["all three"], drafted) <= LIMIT


@pytest.mark.parametrize("mutant", [always_accepts, skips_residual])
def test_enumeration_catches_mutants(mutant: Verifier) -> None:
    """A verifier that always accepts, or skips the residual, is far outside the limit."""
    assert total_variation(mutant, SETTINGS["plain"], drafted=G) > 1e-2


def test_draft_equal_to_the_target_is_always_accepted() -> None:
    """With p = q nothing is rejected, and an empty residual never decides a token."""
    probs = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2])
    almost_one = torch.tensor([[1 - 2.0**-53]], dtype=torch.float64)
    verdict = verify(probs, probs[:, :1], torch.tensor([[1]]), torch.tensor([1]), almost_one, almost_one[0])
    assert verdict.accepted_B.tolist() == [1]
    assert verdict.overlap_B.tolist() == [1.0]


def test_samples_agree_with_the_target_by_chi_square() -> None:
    """The second check, by sampling: 20,000 first tokens against p, at a level of 1e-6."""
    target, draft = TableModel(V, 7), TableModel(V, 8)
    count = 20_000
    rng = np.random.default_rng(0)
    p = torch.from_numpy(target.logits(PROMPT)).softmax(-1)
    q = torch.from_numpy(draft.logits(PROMPT)).softmax(-1)
    uniform = torch.from_numpy(rng.random((count, 3)))
    tokens = sample(q.expand(count, V), uniform[:, 0])
    p_BTV = torch.stack([p, p]).expand(count, 2, V)
    verdict = verify(
        p_BTV,
        q.expand(count, 1, V),
        tokens[:, None],
        torch.ones(count, dtype=torch.long),
        uniform[:, 1:2],
        uniform[:, 2],
    )
    first = torch.where(verdict.accepted_B > 0, tokens, verdict.next_B)
    observed = np.bincount(first.numpy(), minlength=V)
    expected = count * p.numpy()
    assert ((observed - expected) ** 2 / expected).sum() < 30.7  # χ² with 3 degrees of freedom, 1e-6


def test_a_draft_of_no_numbers_stays_exact() -> None:
    """NaN logits of a broken draft become some distribution, and verification corrects any distribution."""

    class Broken(TableModel):
        def logits(self, context: list[int]) -> np.ndarray:  # type: ignore[override]
            return np.full(V, np.nan)

    target = TableModel(V, 3, V**G)
    emitted = emitted_joint(verify, target, Broken(V, 0, V**G), SETTINGS["plain"], G)
    assert np.abs(emitted - target_joint(target, SETTINGS["plain"], G + 1)).sum() / 2 <= LIMIT
