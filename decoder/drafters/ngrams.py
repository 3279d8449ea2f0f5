"""Drafting without a model: what followed the longest suffix of the context when it last occurred.

Prompt lookup, as in Cascade Speculative Drafting's Max-Gram (arXiv 2312.11462, section 3.1): prompt and output are one
text. Candidates are chosen, not drawn: what is kept of them is what the target draws itself.

Legend: B rows, N candidates of a row at most.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from decoder.drafters import Group
from decoder.proposal import CHOSEN, Proposal, Tree
from decoder.ragged import integers, ragged
from decoder.rows import Row
from decoder.shapes import Scheme, chain, chain_of


class NgramDrafter:
    """A `Drafter` of chains."""

    uses_model = False

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        return chain_of(most, "ngrams")

    def propose(self, group: Group) -> Proposal | None:
        asked = zip(group.rows, group.drafted, strict=True)
        found = [row.suffixes.continuation(row.tokens, [], count) for row, count in asked]
        group.drafted[:] = map(len, found)
        longest = max(group.drafted)
        if not longest:
            return None
        count = len(found)
        tree = Tree.of(chain(longest), count, False, group.device)
        tree = replace(tree, sources_BN=torch.full_like(tree.sources_BN, CHOSEN))
        tokens_BN, drafted_B = ragged(found, group.device), integers(group.drafted, group.device)
        nothing_BQV = torch.zeros((count, 0, group.vocab_size), device=group.device)
        return Proposal(tokens_BN, nothing_BQV, [], drafted_B, tree)

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        pass
