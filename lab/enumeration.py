"""Proof of exactness: computes what the verifier emits, and its distance from the target alone.

Nothing is sampled. The verifier takes its randomness as uniforms in [0, 1). For each possible
draft, this module finds by bisection how much of [0, 1) leads to each decision, and multiplies the
measures along each possible outcome. The verifier is measured as a black box, as it serves.

  1. A case holds every possible draft with its probability (`lab/enumeration_cases.py`).
  2. For each node where verification may stop, `emitted` measures how likely it gets there, and
     the distribution of the token emitted there. All nodes are measured in one batch.
  3. A step that emits fewer tokens than the longest one is continued by the target itself.
  4. `distance` compares the sum over all drafts with the target's own joint distribution.

Legend: B sequences (one for each draft), N candidates, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.token_tree import Tree
from lab.enumeration_cases import TARGET, Case, V, logits, same_sampling
from lab.enumeration_stops import NEVER, Stop, Trial

Floats = NDArray[np.float64]
# (logits_BTV, proposal, sampling, accept_uniform_BN, emit_uniform_B) → verification
Verifier = Callable[..., Verification]

HALVINGS = 34  # of [0, 1): leaves an uncertainty of 6e-11
NEGLIGIBLE = 1e-9  # a measure that may be due to this uncertainty alone


def distance(verifier: Verifier, *cases: Case) -> float:
    """Total variation between what is emitted and the target's own joint distribution.

    Several cases are the parts of one drafter's proposals, by shape.
    """
    length = max(case.depth for case in cases) + 1
    found: Floats = sum(emitted(verifier, case, length) for case in cases)  # type: ignore[assignment]
    expected = np.zeros_like(found)
    continue_by_target(expected, cases[0], [], 1.0)
    return float(np.abs(found - expected).sum() / 2)


def emitted(verifier: Verifier, case: Case, length: int) -> Floats:
    """The joint distribution of the next `length` tokens, weighted by the drafts' probability."""
    joint: Floats = np.zeros((V,) * length)
    stops = [Stop.at(case, node) for node in range(len(case.shape) + 1)]
    accepts_B = _acceptances(verifier, case, [trial for stop in stops for trial in stop.trials])
    at_stops = _Repeated(verifier, case, [stop.accept_N for stop in stops])
    accepted_SB, path_SBN = at_stops.accepted()
    emit_SBV = at_stops.emitted()
    for s, stop in enumerate(stops):
        stops_B = case.probability_B * stop.probability(accepts_B)
        for b in torch.nonzero(stops_B > NEGLIGIBLE).flatten().tolist():
            accepted = path_SBN[s][b][: accepted_SB[s][b]]
            assert accepted == [n - 1 for n in stop.path], "the verifier stopped elsewhere"
            for v in range(V):
                emits = [*(case.assignments[b][n] for n in accepted), v]
                continue_by_target(joint, case, emits, float(stops_B[b] * emit_SBV[s, b, v]))
    return joint


def continue_by_target(joint: Floats, case: Case, tokens: list[int], mass: float) -> None:
    """Adds `mass` to all continuations of `tokens`, in the target's proportions."""
    if len(tokens) == joint.ndim:
        joint[tuple(tokens)] += mass
        return
    next_11V = logits(TARGET, tokens, case.logits_BTV.dtype)[None, None]
    probs = probabilities(next_11V, same_sampling(case.setting, 1))[0, 0]
    for v, p in enumerate(probs.double().tolist()):
        continue_by_target(joint, case, [*tokens, v], mass * p)


class _Repeated:
    """A verifier on a batch with all sequences of a case, once for each vector of uniforms.

    One batch of S · B sequences costs little more time than one of B.
    """

    def __init__(self, verifier: Verifier, case: Case, accepts_SN: Sequence[list[float]]) -> None:
        self._shape = len(accepts_SN), len(case.assignments)
        rows = list(range(len(case.assignments))) * len(accepts_SN)
        uniform_SN = torch.tensor(accepts_SN, dtype=torch.float64)
        self.accept_BN = uniform_SN.repeat_interleave(len(case.assignments), 0)
        self.half_B = torch.full((len(rows),), 0.5, dtype=torch.float64)
        given = case.logits_BTV[rows], _select(case.proposal, rows)
        sampling = same_sampling(case.setting, len(rows))
        self.run = lambda accept_BN, emit_B: verifier(*given, sampling, accept_BN, emit_B)

    def accepted(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """How many candidates are accepted, [S, B], and which, [S, B, N]."""
        result = self.run(self.accept_BN, self.half_B)
        paths = result.path_BN.view(*self._shape, -1).tolist()
        return result.accepted_B.view(self._shape).tolist(), paths

    def emitted(self) -> Tensor:
        """The distribution of the emitted token after these decisions, [S, B, V]."""
        draw = lambda u: self.run(self.accept_BN, u).next_B
        return outcome_masses(draw, len(self.half_B), V).view(*self._shape, V)

    def accepts(self, candidates: list[int]) -> Tensor:
        """The measure of one candidate's uniforms that accept it, [S, B]; the others stay."""
        candidate_B1 = torch.tensor(candidates).repeat_interleave(self._shape[1])[:, None]

        def holds(u: Tensor) -> Tensor:
            result = self.run(self.accept_BN.scatter(1, candidate_B1, u[:, None]), self.half_B)
            real_BN = torch.arange(self.accept_BN.shape[1]) < result.accepted_B[:, None]
            return ((result.path_BN == candidate_B1) & real_BN).any(1)

        return boundary(holds, len(self.half_B)).view(self._shape)


def _acceptances(verifier: Verifier, case: Case, trials: list[Trial]) -> dict[Trial, Tensor]:
    """The probability of each trial's candidate to be accepted, by sequence."""
    trials = list(dict.fromkeys(trials))
    count = len(case.shape)
    uniforms = [[*before, *[NEVER] * (count - n)] for n, before in trials]
    found_SB = _Repeated(verifier, case, uniforms).accepts([n for n, _ in trials])
    return dict(zip(trials, found_SB, strict=True))


def _select(proposal: Proposal, rows: list[int]) -> Proposal:
    tree = None if proposal.tree is None else proposal.tree.select(rows)
    own = proposal.tokens_BN[rows], proposal.probs_BQV[rows]
    return Proposal(*own, [], proposal.drafted_B[rows], tree)


def boundary(holds: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """By sequence, the largest uniform for which `holds`, by bisection of [0, 1)."""
    low, high = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        held = holds(middle)
        low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return (low + high) / 2


def outcome_masses(draw: Callable[[Tensor], Tensor], count: int, vocab_size: int) -> Tensor:
    """The measure of the uniforms that `draw` maps to each token, [B, V].

    `draw` must not decrease in its uniform.
    """
    edges = [boundary(lambda u, v=v: draw(u) <= v, count) for v in range(vocab_size)]
    return torch.diff(torch.stack([torch.zeros(count, dtype=torch.float64), *edges], 1), dim=1)


def on(device: torch.device | str, verifier: Verifier) -> Verifier:
    """The verifier as it serves on a device: its arguments go there, and its result comes back."""

    def move(value: Any, there: torch.device | str) -> Any:
        if isinstance(value, Tensor):
            return value.to(there)
        if isinstance(value, list):
            return [move(item, there) for item in value]
        if isinstance(value, (Proposal, Sampling, Tree, Verification)):
            moved = {field.name: move(getattr(value, field.name), there) for field in fields(value)}
            return replace(value, **moved)
        return value

    return lambda *given: move(verifier(*(move(value, device) for value in given)), "cpu")
