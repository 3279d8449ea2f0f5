"""The contract between a drafter and the engine, and what several drafters share.

A drafter proposes candidates for a group of sequences. It never sees the target, and verification
does not know which drafter proposed.

Legend: B sequences of a group, N candidates of a sequence at most, T tokens of a forward,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

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
from online.drafters import Teaching
from online.messages import MAX_GAMMA

# Context tokens that a draft's cache may lack when it drafts: its first forward encodes them.
MAX_LAG = 8

Paths = Sequence[Sequence[int]]  # by sequence: the accepted candidates, in order
CacheCells = Mapping[int, int]  # candidate → cell behind the context in the draft's KV cache


@dataclass(frozen=True, slots=True)
class DraftGroup:
    """Sequences of a step that one draft drafts for, in one shape."""

    draft: LiveDraft
    spec: DraftSpec  # of the sequence that wants the most candidates
    slots: Slots  # of the draft's KV cache
    seqs: Sequence[LiveSequence]
    wanted: Sequence[int]  # candidates, by sequence, at most
    sampling: Sampling
    uniform_BN: Tensor
    vocab_size: int
    device: torch.device | str
    cost: DraftCost = NO_COST  # this group's share of what drafting costs the step
    max_lag: int = MAX_LAG  # a sequence whose draft lags further can't ask its draft in this step

    @property
    def shape(self) -> TreeShape:
        """The shape, cut to the most candidates that a sequence wants."""
        return self.spec.shape.first(max(self.wanted))


@dataclass(frozen=True, slots=True)
class Drafted:
    """What a drafter did for a group. `commit` gets it back after verification."""

    proposal: Proposal | None  # None: nothing to verify
    counts: Sequence[int]  # candidates proposed, by sequence: `wanted` or fewer
    forwards: float | None = None  # of the draft model; None: unknown, so costs learn nothing
    cells: Sequence[CacheCells] = ()  # by sequence; candidates not named are in no cache
    evidence: Sequence[Sequence[Sequence[Evidence]]] = ()  # by sequence and candidate


class Drafter(ABC):
    """Proposes candidates. It has no state: what is learnt belongs to drafts and routes.

    To add one, write a module in this package that lists its instances in `DRAFTERS`.
    """

    name: str  # in requests, settings and metrics
    max_candidates = MAX_GAMMA  # a request may ask for
    nameable = True  # whether requests and settings may ask for it by name
    in_auto = False  # whether the drafter "auto" may choose it
    uses_model = True  # False: it works without a draft
    waits_for_draft = True  # whether sequences decode plainly until the draft's cache is filled

    def teaching(self, gamma: int) -> Teaching:
        """What cycles teach the draft for this drafter, if its sequences draft γ tokens."""
        return {}

    @abstractmethod
    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        """What a sequence drafts in the next step.

        Args:
            gamma: length of the draft's own chain that is fastest; 0: drafting does not pay.
            most: limit for a drafter that decides by itself how much to draft.
        """

    @abstractmethod
    def propose(self, group: DraftGroup) -> Drafted:
        """Drafts for the group. May write to the draft's KV cache behind the contexts."""

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:  # noqa: B027
        """Called after verification, before the sequences extend by the accepted paths."""


def encode_contexts(group: DraftGroup) -> Tensor:
    """Encodes what the draft's cache lacks of the contexts. Returns next logits, [B, 1, V]."""
    unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
    starts_B = integers([seq.draft_cached for seq in group.seqs], group.device)
    upto = max(len(seq.tokens) for seq in group.seqs)
    ids_BT = ragged(unseen, group.device)
    logits_BTV = group.draft.model.forward(group.slots, ids_BT, starts_B, upto)
    for seq in group.seqs:
        seq.set_draft_cached(len(seq.tokens))
    return last_logits(logits_BTV, integers([len(tokens) for tokens in unseen], group.device))


def last_logits(logits_BTV: Tensor, count_B: Tensor) -> Tensor:
    """Logits at each sequence's last token, where `count_B` tokens are real: [B, 1, V]."""
    if logits_BTV.shape[1] == 1:
        return logits_BTV
    last_B11 = (count_B - 1)[:, None, None]
    return logits_BTV.gather(1, last_B11.expand(-1, 1, logits_BTV.shape[-1]))


def commit_cache(group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
    """Makes the cached part of each accepted path a part of the sequence's cached context."""
    for i, (seq, path) in enumerate(zip(group.seqs, accepted, strict=True)):
        cells = drafted.cells[i]
        held = [cells[n] for n in takewhile(cells.__contains__, path)]
        if held != list(range(len(held))):
            group.draft.model.keep_path(slot_at(group.slots, i), seq.draft_cached, held)
        seq.set_draft_cached(seq.draft_cached + len(held))


def record_acceptance(group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
    """Counts, by evidence, which candidates of chains were accepted and which one was rejected."""
    for i, (seq, path) in enumerate(zip(group.seqs, accepted, strict=True)):
        evidence = drafted.evidence[i]
        verified = min(len(path) + 1, drafted.counts[i])
        for n in range(verified):
            for evident in evidence[n]:
                by_ngram = evident.source.kind is SourceKind.NGRAM
                source = seq.ngram_lookup.route_ngrams if by_ngram else seq.draft
                source.token_acceptance.record(evident, n < len(path))
