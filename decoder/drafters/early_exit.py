"""A chain from a draft that can stop after any of its layers.

Sorted Speculative Decoding (S2D, arXiv 2407.01955): the draft's first layers with its own head are
drafts themselves. After each layer a token may be drawn (an exit), or it runs through the next
layer. The choice weighs the acceptance counted for tokens that left at this exit, and for tokens
that passed it, against the cost of a layer. That cost is high if the target is small.

Layers that some tokens skipped run for all of them at once when a later token needs them. Tokens
that stay incomplete are encoded again in the next step, like any token that the cache lacks.
Verification gets the distribution that each token was drawn from, and the choice of the exit does
not depend on the draw: this is exact, however good the exits are. Training for them is in
`trainer/distill.py`.

Legend: B sequences, N drafted tokens of a sequence at most, V vocabulary.
"""

import torch
from torch import Tensor

from decoder.drafters.base import (
    Drafted,
    Drafter,
    DraftGroup,
    Paths,
    commit_cache,
    encode_contexts,
    record_acceptance,
)
from decoder.drafters.layers import draft_of
from decoder.models.ragged import integers
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32, most_likely, probabilities, sample
from online.drafters import Teaching


class ExitDrafter(Drafter):
    """Drafts chains whose tokens leave the draft at the exit that pays.

    A draft without access to its layers runs whole for every token.
    """

    name = "exits"

    def teaching(self, gamma: int) -> Teaching:
        return {"exit_weight": 1}

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(gamma, self.name)

    def propose(self, group: DraftGroup) -> Drafted:
        logits = [at_least_float32(encode_contexts(group))]
        probs: list[Tensor] = []
        tokens: list[Tensor] = []
        draft = draft_of(group)
        for n in range(max(group.wanted)):
            if n:
                logits.append(at_least_float32(draft.next_logits(tokens[-1])))
            if group.sampling.all_greedy:
                tokens.append(most_likely(logits[-1]))
            else:
                probs.append(probabilities(logits[-1], group.sampling))
                tokens.append(sample(probs[-1], group.uniform_BN[:, n : n + 1]))
        drafted_B = integers(list(group.wanted), group.device)
        return Drafted(
            Proposal(
                torch.cat(tokens, 1),
                torch.cat(probs, 1) if probs else logits[0][:, :0],
                logits,
                drafted_B,
            ),
            group.wanted,
            1 + draft.forwards,
            cells=[{n: n for n in range(draft.complete)}] * len(group.seqs),
            evidence=draft.evidence,
        )

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        commit_cache(group, drafted, accepted)
        record_acceptance(group, drafted, accepted)


DRAFTERS = (ExitDrafter(),)
