"""Drafting without a model: what followed the longest suffix of the context where it stood before.

Prompt lookup, as in Cascade Speculative Drafting's Max-Gram (arXiv 2312.11462, section 3.1), in a row's own text and in
what its route has answered of late. Candidates are chosen, not drawn: what is kept of them is what the target draws.

Legend: B rows, N candidates of a row at most.
"""

from collections.abc import Sequence

import torch

from decoder.drafters.base import Group, learn
from decoder.drafters.chain import begun, finished, longest
from decoder.sequence.sequence import Row
from decoder.verification.proposal import Proposal
from decoder.verification.tree_shape import Scheme, chain_of


class NgramDrafter:
    """A `Drafter` of chains."""

    uses_model = waits = False

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        return chain_of(longest(row, most), "ngrams")

    def propose(self, group: Group) -> Proposal | None:
        group.forwards = 0
        nothing_BQV = torch.zeros((len(group.rows), 0, group.vocab_size), device=group.device)
        return finished(begun(group), [], nothing_BQV, group)

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        learn(group, kept)
