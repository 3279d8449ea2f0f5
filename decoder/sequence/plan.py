"""The plan of a step: tokens to draft, sampling parameters and randomness.

Legend: B sequences, N candidates of a sequence at most, U = 2 N + 1
uniforms of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """The sequences of one step, and what it does with each."""

    seqs: Sequence[LiveSequence]
    specs: Sequence[DraftSpec]  # by sequence
    sampling: Sampling
    draft_uniform_BN: Tensor
    accept_uniform_BN: Tensor
    emit_uniform_B: Tensor
    lenient: LenientAcceptance | None = None  # None: all are exact

    @property
    def drafted(self) -> list[int]:
        """Number of candidates, by sequence."""
        return [spec.candidates for spec in self.specs]

    @property
    def gamma(self) -> int | None:
        """Length of the longest chain; None if anything else is drafted."""
        chains = all(spec.drafter == "chain" for spec in self.specs if spec.candidates)
        return max(self.drafted) if chains else None


class Uniforms(NamedTuple):
    """Uniform random numbers of a step."""

    draft_BN: Tensor
    accept_BN: Tensor
    emit_B: Tensor


Settings = tuple[Sampling, LenientAcceptance | None]


class Planner:
    """Plans steps. Reuses tensors where the next step needs the same ones."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seqs: list[LiveSequence] | None = None  # of the last step
        self._settings: Settings
        self._zeros: dict[tuple[int, int], Uniforms] = {}  # by sequences and candidates

    def plan(self, seqs: list[LiveSequence], specs: list[DraftSpec]) -> StepPlan:
        """The plan of a step in which sequence i drafts by `specs[i]`."""
        sampling, lenient = self._sampling(seqs)
        drafted = [spec.candidates for spec in specs]
        if sampling.all_greedy:
            uniforms = self._unused(len(seqs), max(drafted))
            return StepPlan(seqs, specs, sampling, *uniforms)
        return StepPlan(seqs, specs, sampling, *self._draw(seqs, drafted), lenient)

    def _unused(self, seqs: int, candidates: int) -> Uniforms:
        """Greedy steps use no randomness."""
        key = seqs, candidates
        if key not in self._zeros:
            self._zeros[key] = self._upload(np.zeros((seqs, 2 * candidates + 1)))
        return self._zeros[key]

    def _draw(self, seqs: list[LiveSequence], drafted: list[int]) -> Uniforms:
        """Each sequence draws from its own generator: its batch has no influence."""
        most = max(drafted)
        uniform_BU = np.zeros((len(seqs), 2 * most + 1))
        for uniform_U, seq, count in zip(uniform_BU, seqs, drafted, strict=True):
            if seq.query.temperature > 0:
                own = seq.rng.random(2 * count + 1)
                uniform_U[:count] = own[:count]
                uniform_U[most : most + count] = own[count:-1]
                uniform_U[-1] = own[-1]
        return self._upload(uniform_BU)

    def _upload(self, uniform_BU: NDArray[np.float64]) -> Uniforms:
        uploaded_BU = upload(uniform_BU, self._device)
        most = uniform_BU.shape[1] // 2
        return Uniforms(
            draft_BN=uploaded_BU[:, :most],
            accept_BN=uploaded_BU[:, most:-1],
            emit_B=uploaded_BU[:, -1],
        )

    def _sampling(self, seqs: list[LiveSequence]) -> Settings:
        """The batch's settings, computed only when its sequences change."""
        if self._seqs != seqs:
            queries = [seq.query for seq in seqs]
            sampling = Sampling.of(
                [query.temperature for query in queries],
                [query.top_k for query in queries],
                [query.top_p for query in queries],
                self._vocab_size,
                self._device,
            )
            lenience = [query.lenience for query in queries]
            self._settings = sampling, LenientAcceptance.of(lenience, self._device)
            self._seqs = seqs
        return self._settings
