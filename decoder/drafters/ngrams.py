"""Drafting without a model: what followed the longest suffix of the context where it stood before.

Prompt lookup, as in Cascade Speculative Drafting's Max-Gram (arXiv 2312.11462, section 3.1), in a sequence's own text and in
what its route has answered of late. Candidates are chosen, not drawn: what is kept of them is what the target draws.

Legend: B sequences, N candidates of a sequence at most.
"""

from collections.abc import Sequence

import torch

from decoder.drafters.base import DraftGroup, learn
from decoder.drafters.chain import begun, finished, longest
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal


class NgramDrafter:
    """A `Drafter` of chains."""

    uses_model = waits = False

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(longest(seq, most), "ngrams")

    def propose(self, group: DraftGroup) -> Proposal | None:
        group.forwards = 0
        nothing_BQV = torch.zeros((len(group.seqs), 0, group.vocab_size), device=group.device)
        return finished(begun(group), [], nothing_BQV, group)

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        learn(group, kept)
