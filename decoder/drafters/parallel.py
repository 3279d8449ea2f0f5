"""A chain from one forward: mask tokens behind the context get a distribution each.

ParallelSpec (arXiv 2410.05589), with one mask token for all positions as in PARD
(arXiv 2504.18583). Tokens are drawn independently, and verification gets the distributions they
were drawn from: this is exact, however well the draft predicts at masks. Training for it is in
`trainer/batches.py`.

Legend: B sequences, T tokens of the forward, N drafted tokens of a sequence at most, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.drafters.base import Drafted, Drafter, DraftGroup
from decoder.models.ragged import integers, ragged
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32, most_likely, probabilities, sample
from online.drafters import Teaching


class ParallelDrafter(Drafter):
    """Drafts chains from masks. The cells that masks wrote are overwritten later."""

    name = "parallel"

    def teaching(self, gamma: int) -> Teaching:
        return {"masks": max(0, gamma - 1)}

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(gamma, self.name)

    def propose(self, group: DraftGroup) -> Drafted:
        logits_BNV = _forward(group, max(group.wanted))
        if group.sampling.all_greedy:
            probs_BNV = logits_BNV[:, :0]
            tokens_BN = most_likely(logits_BNV)
        else:
            probs_BNV = probabilities(logits_BNV, group.sampling)
            tokens_BN = sample(probs_BNV, group.uniform_BN[:, : logits_BNV.shape[1]])
        for seq in group.seqs:
            seq.set_draft_cached(len(seq.tokens))
        logits = [logits_BNV[:, n : n + 1] for n in range(logits_BNV.shape[1])]
        drafted_B = integers(list(group.wanted), group.device)
        return Drafted(Proposal(tokens_BN, probs_BNV, logits, drafted_B), group.wanted)


def _forward(group: DraftGroup, count: int) -> Tensor:
    """Logits at the last context token and at the `count` - 1 masks behind it, [B, N, V]."""
    device = group.device
    masks = [group.draft.model.mask_id] * (count - 1)
    unseen = [seq.tokens[seq.draft_cached :] for seq in group.seqs]
    ids_BT = ragged([tokens + masks for tokens in unseen], device)
    starts_B = integers([seq.draft_cached for seq in group.seqs], device)
    upto = max(len(seq.tokens) for seq in group.seqs) + len(masks)
    logits_BTV = group.draft.model.forward(group.slots, ids_BT, starts_B, upto)
    last_B1 = integers([len(tokens) - 1 for tokens in unseen], device)[:, None]
    position_BN = last_B1 + torch.arange(count, device=device)
    sequence_B1 = torch.arange(len(unseen), device=device)[:, None]
    return at_least_float32(logits_BTV[sequence_B1, position_BN])


DRAFTERS = (ParallelDrafter(),)
