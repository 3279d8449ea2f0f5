"""The target's side of a step: one forward over all candidates, and verification.

Legend: B sequences, N candidates of a sequence at most, T = N + 1 verified nodes, M tokens of the
forward: context that the target's cache lacks, then candidates, V vocabulary.
"""

from collections.abc import Sequence

import torch

from decoder.models.base import LanguageModel
from decoder.models.ragged import integers, ragged
from decoder.recording.observation import Observation, RecordLimits, observe
from decoder.sequence.plan import StepPlan
from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification, VerifiedSequence
from decoder.verification.sampling import at_least_float32
from decoder.verification.verify import verify


class Verifier:
    """Runs the target over proposals. The sequences of a plan lie in the first slots."""

    def __init__(
        self, target: LanguageModel, record: RecordLimits, device: torch.device | str
    ) -> None:
        self._target, self._record, self._device = target, record, device

    def verify(self, plan: StepPlan, proposal: Proposal) -> tuple[Verification, Observation | None]:
        """The observation is None where nobody records or reports anything."""
        logits_BTV = self._forward(plan, proposal)
        verification = verify(
            logits_BTV,
            proposal,
            plan.sampling,
            plan.accept_uniform_BN[:, : proposal.candidates],
            plan.emit_uniform_B,
            plan.lenient,
        )
        return verification, self._observe(plan, proposal, verification, logits_BTV)

    def commit(self, plan: StepPlan, verified: Sequence[VerifiedSequence]) -> None:
        """Moves the accepted paths of trees behind the contexts in the target's cache."""
        for slot, seq in enumerate(plan.seqs):
            path = verified[slot].path[: verified[slot].accepted]
            if path and path[-1] != len(path) - 1:
                self._target.keep_path(slot, len(seq.tokens), path)

    def _forward(self, plan: StepPlan, proposal: Proposal) -> torch.Tensor:
        """The target's logits at each sequence's last token and at its candidates, [B, T, V]."""
        # Usually the last token; more where a lone sequence's prompt is encoded in this step.
        context_BM = ragged([seq.tokens[seq.cached :] for seq in plan.seqs], self._device)
        before = context_BM.shape[1] - 1
        ids_BM = context_BM
        if proposal.candidates:
            ids_BM = torch.cat([context_BM, proposal.tokens_BN], 1)
        # The longest real context: padding is written beyond it, but never read.
        upto = max(
            len(seq.tokens) + count for seq, count in zip(plan.seqs, plan.drafted, strict=True)
        )
        starts_B = integers([seq.cached for seq in plan.seqs], self._device)
        positions = None if proposal.tree is None else proposal.tree.positions(before)
        slots = slice(0, len(plan.seqs))
        logits_BMV = self._target.forward(slots, ids_BM, starts_B, upto, positions)
        return at_least_float32(logits_BMV[:, before:])

    def _observe(
        self,
        plan: StepPlan,
        proposal: Proposal,
        verification: Verification,
        logits_BTV: torch.Tensor,
    ) -> Observation | None:
        asked = [seq.query.logprobs for seq in plan.seqs if seq.query.logprobs is not None]
        if not asked and all(seq.trace is None for seq in plan.seqs):
            return None
        reported = max(asked, default=None)
        return observe(logits_BTV, proposal, verification, self._record, reported)
