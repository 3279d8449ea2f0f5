"""Drafters: what proposes candidates. None knows another, and no verifier knows any of them.

Legend: B sequences of a group, N candidates of a sequence at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from decoder.models.kv_cache import Slots, slot_at
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import Evidence, SourceKind
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling
from decoder.verification.tree_shape import TreeShape

FEED = (
    8  # tokens that a draft may lack and still get with its first forward; more are encoded before
)


@dataclass(slots=True)
class DraftGroup:
    """Sequences of a step that are drafted for together."""

    draft: LiveDraft
    spec: DraftSpec  # the one with the most candidates
    slots: Slots
    seqs: Sequence[LiveSequence]
    drafted: list[int]  # candidates, by sequence; a drafter that finds fewer says so here
    sampling: Sampling
    uniform_BN: Tensor
    vocab_size: int
    device: torch.device | str
    price: DraftCost = (
        NO_COST  # of what drafting costs all sequences of the step, these sequences' share
    )
    feed: int = FEED  # tokens of its context that a sequence's draft may lack and still be asked in this step
    forwards: float | None = (
        None  # of the draft model, where the drafter counts them: prices are learnt from it
    )
    # By sequence: of candidates whose keys the draft's slot holds, the cell behind the context.
    cells: list[dict[int, int]] = field(default_factory=list)
    evidence: list[list[list[Evidence]]] = field(
        default_factory=list
    )  # by sequence and candidate: what spoke for it

    @property
    def shape(self) -> TreeShape:
        return self.spec.shape.first(max(self.drafted))


class Drafter(Protocol):
    uses_model: bool  # else it needs no draft
    waits: bool  # until its draft is up with a sequence's context; else it does without, and says when that was a pity

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        """What a sequence is to draft, where a chain of γ from its draft would be the fastest, and of `most` candidates."""
        ...

    def propose(self, group: DraftGroup) -> Proposal | None:
        """None: there is nothing to propose. May write to the draft's cache behind the sequences' contexts, and says in
        `draft_cached` what that holds."""
        ...

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        """Verification is over: by sequence, the candidates that are a part of its context now, in order."""
        ...


def begin(group: DraftGroup) -> Tensor:
    """Feeds the draft what its slots lack of the sequences' contexts, and returns what it says behind them, [B, 1, V]."""
    unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
    starts_B = integers([seq.draft_cached for seq in group.seqs], group.device)
    upto = max(len(seq.tokens) for seq in group.seqs)
    logits_BTV = group.draft.model.forward(
        group.slots, ragged(unseen, group.device), starts_B, upto
    )
    for seq in group.seqs:
        seq.set_draft_cached(len(seq.tokens))
    return behind(logits_BTV, integers([len(tokens) for tokens in unseen], group.device))


def behind(logits_BTV: Tensor, fed_B: Tensor) -> Tensor:
    """Those of each sequence's last real token, [B, 1, V]."""
    if logits_BTV.shape[1] == 1:
        return logits_BTV
    return logits_BTV.gather(1, (fed_B - 1)[:, None, None].expand(-1, 1, logits_BTV.shape[-1]))


def keep(group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
    """What the draft's slots hold of accepted paths becomes a part of the sequences' contexts."""
    for i, (seq, path, cells) in enumerate(zip(group.seqs, kept, group.cells, strict=True)):
        held = [cells[n] for n in takewhile(cells.__contains__, path)]
        if held != list(range(len(held))):
            group.draft.model.keep_path(slot_at(group.slots, i), seq.draft_cached, held)
        seq.set_draft_cached(seq.draft_cached + len(held))


def learn(group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
    """What became of the candidates that verification came to, of chains."""
    for seq, path, count, evidence in zip(
        group.seqs, kept, group.drafted, group.evidence, strict=True
    ):
        for n in range(min(len(path) + 1, count)):
            for one in evidence[n]:
                from_ngrams = one.source.kind is SourceKind.NGRAM
                owner = seq.ngram_lookup.route_ngrams if from_ngrams else seq.draft
                owner.token_acceptance.record(one, n < len(path))
