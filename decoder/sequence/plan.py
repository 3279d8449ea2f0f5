"""What a step is about to do with its rows: tokens to draft, sampling parameters, and the randomness it will use.

Legend: B rows, N candidates of a row at most, U uniforms of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.device.transfer import upload
from decoder.sequence.sequence import Row
from decoder.verification.lenience import Lenient
from decoder.verification.sampling import Sampling
from decoder.verification.tree_shape import Scheme


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step is about to do with its rows."""

    rows: list[Row]
    schemes: list[Scheme]  # what each row drafts
    sampling: Sampling
    draft_uniform_BN: Tensor
    accept_uniform_BN: Tensor
    emit_uniform_B: Tensor
    lenient: Lenient | None = None  # None: all rows are exact

    @property
    def drafted(self) -> list[int]:
        """Candidates, by row."""
        return [scheme.candidates for scheme in self.schemes]

    @property
    def gamma(self) -> int | None:
        """The longest of its chains; None where anything else is drafted."""
        chained = all(scheme.drafter == "chain" for scheme in self.schemes if scheme.candidates)
        return max(self.drafted) if chained else None


Uniforms = tuple[
    Tensor, Tensor, Tensor
]  # for drafting [B, N], for accepting [B, N], for emitting [B]


class Planner:
    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._known: tuple[list[Row], Sampling, Lenient | None] | None = None
        self._undrawn: dict[tuple[int, int], Uniforms] = {}

    def plan(self, rows: list[Row], schemes: list[Scheme]) -> StepPlan:
        (sampling, lenient), drafted = (
            self._asked_by(rows),
            [scheme.candidates for scheme in schemes],
        )
        most = max(drafted)
        if not sampling.all_greedy:
            return StepPlan(rows, schemes, sampling, *self._draw(rows, drafted, most), lenient)
        if (key := (len(rows), most)) not in self._undrawn:
            self._undrawn[key] = self._split(np.zeros((len(rows), 2 * most + 1)), most)
        return StepPlan(rows, schemes, sampling, *self._undrawn[key])

    def _draw(self, rows: list[Row], drafted: list[int], most: int) -> Uniforms:
        uniform = np.zeros((len(rows), 2 * most + 1))
        for i, (row, count) in enumerate(zip(rows, drafted, strict=True)):
            if row.query.temperature > 0:
                # A row draws only for itself, so its randomness does not depend on who shares the batch.
                own = row.rng.random(2 * count + 1)
                uniform[i, :count], uniform[i, most : most + count] = own[:count], own[count:-1]
                uniform[i, -1] = own[-1]
        return self._split(uniform, most)

    def _split(self, uniform: NDArray[np.float64], most: int) -> Uniforms:
        uniform_BU = upload(uniform, self._device)
        return uniform_BU[:, :most], uniform_BU[:, most:-1], uniform_BU[:, -1]

    def _asked_by(self, rows: list[Row]) -> tuple[Sampling, Lenient | None]:
        """Made anew only when other rows decode than in the step before."""
        if self._known is None or self._known[0] != rows:
            queries = [row.query for row in rows]
            sampling = Sampling.of(
                [q.temperature for q in queries],
                [q.top_k for q in queries],
                [q.top_p for q in queries],
                self._vocab_size,
                self._device,
            )
            self._known = rows, sampling, Lenient.of([q.lenience for q in queries], self._device)
        return self._known[1:]
