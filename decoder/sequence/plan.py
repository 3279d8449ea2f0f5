"""What a step is about to do with its sequences: tokens to draft, sampling parameters, and the randomness it will use.

Legend: B sequences, N candidates of a sequence at most, U uniforms of a sequence.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoder.device.transfer import upload
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec
from decoder.verification.lenience import LenientAcceptance
from decoder.verification.sampling import Sampling


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step is about to do with its sequences."""

    seqs: list[LiveSequence]
    specs: list[DraftSpec]  # what each sequence drafts
    sampling: Sampling
    draft_uniform_BN: Tensor
    accept_uniform_BN: Tensor
    emit_uniform_B: Tensor
    lenient: LenientAcceptance | None = None  # None: all sequences are exact

    @property
    def drafted(self) -> list[int]:
        """Candidates, by sequence."""
        return [spec.candidates for spec in self.specs]

    @property
    def gamma(self) -> int | None:
        """The longest of its chains; None where anything else is drafted."""
        chained = all(spec.drafter == "chain" for spec in self.specs if spec.candidates)
        return max(self.drafted) if chained else None


Uniforms = tuple[
    Tensor, Tensor, Tensor
]  # for drafting [B, N], for accepting [B, N], for emitting [B]


class Planner:
    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size, self._device = vocab_size, device
        self._known: tuple[list[LiveSequence], Sampling, LenientAcceptance | None] | None = None
        self._undrawn: dict[tuple[int, int], Uniforms] = {}

    def plan(self, seqs: list[LiveSequence], specs: list[DraftSpec]) -> StepPlan:
        (sampling, lenient), drafted = (
            self._asked_by(seqs),
            [spec.candidates for spec in specs],
        )
        most = max(drafted)
        if not sampling.all_greedy:
            return StepPlan(seqs, specs, sampling, *self._draw(seqs, drafted, most), lenient)
        if (key := (len(seqs), most)) not in self._undrawn:
            self._undrawn[key] = self._split(np.zeros((len(seqs), 2 * most + 1)), most)
        return StepPlan(seqs, specs, sampling, *self._undrawn[key])

    def _draw(self, seqs: list[LiveSequence], drafted: list[int], most: int) -> Uniforms:
        uniform = np.zeros((len(seqs), 2 * most + 1))
        for i, (seq, count) in enumerate(zip(seqs, drafted, strict=True)):
            if seq.query.temperature > 0:
                # A sequence draws only for itself, so its randomness does not depend on who shares the batch.
                own = seq.rng.random(2 * count + 1)
                uniform[i, :count], uniform[i, most : most + count] = own[:count], own[count:-1]
                uniform[i, -1] = own[-1]
        return self._split(uniform, most)

    def _split(self, uniform: NDArray[np.float64], most: int) -> Uniforms:
        uniform_BU = upload(uniform, self._device)
        return uniform_BU[:, :most], uniform_BU[:, most:-1], uniform_BU[:, -1]

    def _asked_by(self, seqs: list[LiveSequence]) -> tuple[Sampling, LenientAcceptance | None]:
        """Made anew only when other sequences decode than in the step before."""
        if self._known is None or self._known[0] != seqs:
            queries = [seq.query for seq in seqs]
            sampling = Sampling.of(
                [q.temperature for q in queries],
                [q.top_k for q in queries],
                [q.top_p for q in queries],
                self._vocab_size,
                self._device,
            )
            self._known = (
                seqs,
                sampling,
                LenientAcceptance.of([q.lenience for q in queries], self._device),
            )
        return self._known[1:]
