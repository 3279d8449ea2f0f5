"""Proof of exactness: computes what the verifier emits, and its distance from the target alone.

Nothing is sampled. The verifier takes its randomness as uniforms in [0, 1). For each possible
draft, this module finds by bisection how much of [0, 1) leads to each decision, and multiplies the
measures along each possible outcome. The verifier is measured as a black box, as it serves.

  1. A case holds every possible draft with its probability (`lab/enumeration_cases.py`).
  2. For each node where verification may stop, `emitted` measures how likely it gets there, and
     the distribution of the token emitted there.
  3. A step that emits fewer tokens than the longest one is continued by the target itself.
  4. `distance` compares the sum over all drafts with the target's own joint distribution.

Legend: B sequences (one for each draft), N candidates, V vocabulary.
"""

from collections.abc import Callable
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
from lab.enumeration_cases import TARGET, Case, Shape, V, logits, path_to, same_sampling

Floats = NDArray[np.float64]
# (logits_BTV, proposal, sampling, accept_uniform_BN, emit_uniform_B) → verification
Verifier = Callable[..., Verification]

HALVINGS = 34  # of [0, 1): leaves an uncertainty of 6e-11
NEGLIGIBLE = 1e-9  # a measure that may be due to this uncertainty alone
ALWAYS, NEVER = 0.0, 1 - 2.0**-53  # uniforms that accept wherever possible, and nowhere


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
    measured = _Measured(verifier, case)
    for node in range(len(case.shape) + 1):
        path = path_to(case.shape, node)
        stops_B, accept_BN = measured.stopping_at(node)
        stops_B = stops_B * case.probability_B
        emit_BV = measured.emitted_after(accept_BN)
        result = measured.run(accept_BN)
        for b, tokens in enumerate(case.assignments):
            if stops_B[b] <= NEGLIGIBLE:
                continue
            accepted = result.path_BN[b, : result.accepted_B[b]].tolist()
            assert accepted == [n - 1 for n in path], "the verifier stopped elsewhere"
            for v in range(V):
                emits = [*(tokens[n] for n in accepted), v]
                continue_by_target(joint, case, emits, float(stops_B[b] * emit_BV[b, v]))
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


class _Measured:
    """A verifier on one case, as a function of its uniforms."""

    def __init__(self, verifier: Verifier, case: Case) -> None:
        self._verifier, self._case = verifier, case
        self._count, self._candidates = len(case.assignments), len(case.shape)

    def run(self, accept_BN: Tensor, emit_B: Tensor | None = None) -> Verification:
        case = self._case
        if emit_B is None:
            emit_B = torch.full((self._count,), 0.5, dtype=torch.float64)
        return self._verifier(case.logits_BTV, case.proposal, case.sampling, accept_BN, emit_B)

    def emitted_after(self, accept_BN: Tensor) -> Tensor:
        """The distribution of the emitted token after these decisions, [B, V]."""
        return outcome_masses(lambda u: self.run(accept_BN, u).next_B, self._count, V)

    def stopping_at(self, node: int) -> tuple[Tensor, Tensor]:
        """The probability that verification stops at a node, and uniforms that make it stop."""
        accept_BN = torch.full((self._count, self._candidates), ALWAYS, dtype=torch.float64)
        if self._case.is_block:
            return self._block_stopping_at(node, accept_BN)
        stops_B = torch.ones(self._count, dtype=torch.float64)
        path = path_to(self._case.shape, node)
        for n in tried_on(self._case.shape, path):
            accepts_B, on_path = self._acceptance(n, accept_BN), n + 1 in path
            stops_B = stops_B * (accepts_B if on_path else 1 - accepts_B)
            accept_BN[:, n] = ALWAYS if on_path else NEVER
        return stops_B, accept_BN

    def _block_stopping_at(self, length: int, accept_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Block verification accepts the longest prefix that passes.

        It stops after `length` tokens if that prefix passes and no longer one does.
        """
        stops_B = torch.ones(self._count, dtype=torch.float64)
        for n in range(max(0, length - 1), self._candidates):
            passes_B = self._acceptance(n, torch.full_like(accept_BN, ALWAYS))
            stops_B = stops_B * (passes_B if n < length else 1 - passes_B)
        accept_BN[:, length:] = NEVER
        return stops_B, accept_BN

    def _acceptance(self, n: int, before_BN: Tensor) -> Tensor:
        """The measure of candidate n's uniforms that accept it.

        Candidates before it get the given uniforms, those after it are rejected.
        """

        def accepts(u: Tensor) -> Tensor:
            trial_BN = before_BN.clone()
            trial_BN[:, n], trial_BN[:, n + 1 :] = u, NEVER
            result = self.run(trial_BN)
            real_BN = torch.arange(self._candidates) < result.accepted_B[:, None]
            return ((result.path_BN == n) & real_BN).any(1)

        return boundary(accepts, self._count)


def tried_on(shape: Shape, path: list[int]) -> list[int]:
    """The candidates that are tried on a path: at each of its nodes, up to the one accepted."""
    found = []
    for n, parent in enumerate(shape):
        accepted = next((node for node in path if shape[node - 1] == parent), len(shape) + 1)
        if parent in (0, *path) and n + 1 <= accepted:
            found.append(n)
    return found


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
