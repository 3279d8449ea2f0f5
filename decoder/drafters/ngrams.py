"""Drafting without a model: the token that followed the longest known suffix of the context.

Prompt lookup, as in the Max-Gram of Cascade Speculative Drafting (arXiv 2312.11462, section 3.1),
in the sequence's own text and in recent answers of its route. Candidates are chosen, not drawn:
the target accepts one if it draws the same token.

Legend: B sequences, Q draft distributions (none here), V vocabulary.
"""

import torch

from decoder.drafters.base import Drafted, Drafter, DraftGroup, Paths, record_acceptance
from decoder.drafters.chain_stop import drafted_chains, length_limit, start_chains
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec


class NgramDrafter(Drafter):
    """Drafts chains by n-gram lookup."""

    name = "ngrams"
    in_auto = True
    uses_model = False
    waits_for_draft = False

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(length_limit(seq, most), self.name)

    def propose(self, group: DraftGroup) -> Drafted:
        no_probs_BQV = torch.zeros((len(group.seqs), 0, group.vocab_size), device=group.device)
        return drafted_chains(start_chains(group), [], no_probs_BQV, group, forwards=0)

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        record_acceptance(group, drafted, accepted)


DRAFTERS = (NgramDrafter(),)
