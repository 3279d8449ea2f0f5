"""A chain from one forward: mask tokens behind the context, each answered by a distribution of its own.

ParallelSpec (arXiv 2410.05589), with one mask token for all places as in PARD (arXiv 2504.18583). Tokens are drawn
independently, each from what stands at its place, and that is what verification is told: exact, whatever the draft has
learnt of masks. What it learns of them is in `trainer/batches.py`.

Legend: B sequences, F tokens of the forward, N drafted tokens of a sequence at most, V vocabulary.
"""

from collections.abc import Sequence

import torch

from decoder.drafters.base import DraftGroup
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32, most_likely, probabilities, sample


class ParallelDrafter:
    """A `Drafter` of chains."""

    uses_model = waits = True

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(gamma, "parallel")

    def propose(self, group: DraftGroup) -> Proposal:
        masks, device = [group.draft.model.mask_id] * (max(group.drafted) - 1), group.device
        unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
        ids_BF = ragged([tokens + masks for tokens in unseen], device)
        starts_B = integers([seq.draft_cached for seq in group.seqs], device)
        upto = max(len(seq.tokens) for seq in group.seqs) + len(masks)
        logits_BFV = group.draft.model.forward(group.slots, ids_BF, starts_B, upto)
        last_B1 = integers([len(tokens) - 1 for tokens in unseen], device)[:, None]
        place_BN = last_B1 + torch.arange(len(masks) + 1, device=device)
        row_B1 = torch.arange(len(unseen), device=device)[:, None]
        logits_BNV = at_least_float32(logits_BFV[row_B1, place_BN])
        if group.sampling.all_greedy:
            probs_BNV, tokens_BN = logits_BNV[:, :0], most_likely(logits_BNV)
        else:
            probs_BNV = probabilities(logits_BNV, group.sampling)
            tokens_BN = sample(probs_BNV, group.uniform_BN[:, : len(masks) + 1])
        for seq in group.seqs:
            seq.set_draft_cached(len(seq.tokens))  # what masks wrote is written over
        logits = [logits_BNV[:, n : n + 1] for n in range(logits_BNV.shape[1])]
        return Proposal(tokens_BN, probs_BNV, logits, integers(group.drafted, device))

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        pass
