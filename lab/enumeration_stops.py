"""Where verification may stop, and the decisions that lead there.

Legend: B sequences, N candidates.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.enumeration_cases import Case, Shape, path_to

ALWAYS, NEVER = 0.0, 1 - 2.0**-53  # uniforms that accept wherever possible, and nowhere

# A candidate, and the uniforms of all candidates before it; those after it are rejected.
Trial = tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Stop:
    """A node where verification may stop, and the uniforms that make it stop there."""

    path: list[int]
    accept_N: list[float]
    trials: list[Trial]  # the decisions on the way
    passed: list[bool]  # and how each of them falls

    @classmethod
    def at(cls, case: Case, node: int) -> "Stop":
        count, path = len(case.shape), path_to(case.shape, node)
        if case.is_block:
            return cls._of_block(node, count, path)
        accept_N, trials = [ALWAYS] * count, []
        for n in tried_on(case.shape, path):
            trials.append((n, tuple(accept_N[:n])))
            accept_N[n] = ALWAYS if n + 1 in path else NEVER
        return cls(path, accept_N, trials, [n + 1 in path for n, _ in trials])

    @classmethod
    def _of_block(cls, length: int, count: int, path: list[int]) -> "Stop":
        """Block verification accepts the longest prefix that passes.

        It stops after `length` tokens if that prefix passes and no longer one does.
        """
        trials: list[Trial] = [(n, (ALWAYS,) * n) for n in range(max(0, length - 1), count)]
        accept_N = [ALWAYS] * length + [NEVER] * (count - length)
        return cls(path, accept_N, trials, [n < length for n, _ in trials])

    def probability(self, accepts_B: Mapping[Trial, Tensor]) -> Tensor:
        """That verification stops here, by sequence."""
        found_B = torch.ones((), dtype=torch.float64)
        for trial, passes in zip(self.trials, self.passed, strict=True):
            found_B = found_B * (accepts_B[trial] if passes else 1 - accepts_B[trial])
        return found_B


def tried_on(shape: Shape, path: list[int]) -> list[int]:
    """The candidates that are tried on a path: at each of its nodes, up to the one accepted."""
    found = []
    for n, parent in enumerate(shape):
        accepted = next((node for node in path if shape[node - 1] == parent), len(shape) + 1)
        if parent in (0, *path) and n + 1 <= accepted:
            found.append(n)
    return found
