"""Groups of sequences that are drafted for together.

Legend: B sequences, N candidates of a sequence at most.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from decoder.drafters.base import DraftGroup
from decoder.models.ragged import slots_of
from decoder.policy.draft_cost import DraftCost
from decoder.rollout.live import LiveDraft
from decoder.sequence.plan import StepPlan
from decoder.verification.draft_spec import DraftSpec


def members_by_draft(plan: StepPlan) -> list[list[int]]:
    """Sequences that draft, by draft and shape. They may want different numbers of candidates."""
    alike: dict[tuple[LiveDraft, DraftSpec], list[int]] = {}
    for i, (seq, spec) in enumerate(zip(plan.seqs, plan.specs, strict=True)):
        if spec.candidates:
            alike.setdefault((seq.draft, replace(spec, candidates=0)), []).append(i)
    return list(alike.values())


def group_of(
    plan: StepPlan,
    members: Sequence[int],
    cost: DraftCost,
    max_lag: int,
    vocab_size: int,
    device: torch.device | str,
) -> DraftGroup:
    """The group of these sequences of a step; `cost` is the group's share."""
    everyone = len(members) == len(plan.seqs)
    specs = [plan.specs[i] for i in members]
    indices = list(members)
    return DraftGroup(
        draft=plan.seqs[indices[0]].draft,
        spec=max(specs, key=lambda spec: spec.candidates),
        slots=slots_of(indices),
        seqs=[plan.seqs[i] for i in members],
        wanted=[spec.candidates for spec in specs],
        sampling=plan.sampling if everyone else plan.sampling.select(indices),
        uniform_BN=plan.draft_uniform_BN if everyone else plan.draft_uniform_BN[indices],
        vocab_size=vocab_size,
        device=device,
        cost=cost,
        max_lag=max_lag,
    )
