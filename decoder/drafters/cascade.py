"""A cascade: n-grams draft the tokens they are sure of, the draft model those worth a forward.

Cascade Speculative Drafting (arXiv 2312.11462). Horizontal cascade (section 3.2): the dearer
drafter has the early positions, cheaper ones follow. Here n-grams also have early positions where
they are as good as the model, because that saves a forward. Vertical cascade (section 3.1):
n-grams guess the model's tokens, and one forward checks several. It is exact at any temperature:
the model draws every token with the same uniforms as in an ordinary chain, and a guess only
decides whether the next distribution is already computed.

Everything depends on earlier tokens and on other sequences only, as verification requires.

Legend: B sequences, N candidates of a sequence at most, Q drawn tokens of a sequence at most,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from decoder.drafters.base import Drafted, Drafter, DraftGroup, Paths, record_acceptance
from decoder.drafters.chain import Chain
from decoder.drafters.chain_stop import (
    drafted_chains,
    length_limit,
    start_chains,
    tokens_worth_a_forward,
)
from decoder.drafters.model_draws import ModelDraws
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.sampling import Sampling
from online.drafters import Teaching

MASKS = 3  # tokens that one forward of a parallel cascade draws at masks, beside the first


class CascadeDrafter(Drafter):
    """Drafts chains by n-grams and the draft model."""

    name = "cascade"
    in_auto = True
    waits_for_draft = False
    masks = 0  # tokens that one forward draws at masks, beside the first

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        limit = length_limit(seq, most)
        model_budget = limit if seq.query.gamma is None else (limit + 1) // 2
        return replace(chain_spec(limit, self.name), model_budget=model_budget)

    def propose(self, group: DraftGroup) -> Drafted:
        chains = start_chains(group)
        logits_BQV, probs_BQV, forwards = propose(
            group.draft.model,
            group.slots,
            chains,
            group.sampling,
            group.uniform_BN,
            group.cost,
            self.masks,
        )
        for seq, chain in zip(group.seqs, chains, strict=True):
            seq.set_draft_cached(chain.cached)  # after a rejection the batch cuts this back
            seq.wants_catch_up = chain.wants_catch_up
        return drafted_chains(chains, logits_BQV, probs_BQV, group, forwards)

    def commit(self, group: DraftGroup, drafted: Drafted, accepted: Paths) -> None:
        record_acceptance(group, drafted, accepted)


class ParallelCascadeDrafter(CascadeDrafter):
    """A cascade whose model draws several tokens per forward, at masks (see `parallel`)."""

    name = "parallel_cascade"
    masks = MASKS

    def teaching(self, gamma: int) -> Teaching:
        return {"masks": self.masks}


def propose(
    model: LanguageModel,
    slots: Slots,
    chains: Sequence[Chain],
    sampling: Sampling,
    uniform_BN: Tensor,
    cost: DraftCost = NO_COST,
    masks: int = 0,
) -> tuple[list[Tensor], Tensor, int]:
    """Drafts the chains, up to what n-grams add behind the model's last token.

    Returns the logits of the model's tokens, [B, 1, V] each, their probabilities, [B, Q, V], and
    the number of the model's forwards. The slots hold each chain's first `cached` tokens, never
    its last one.
    """
    draws = ModelDraws(model, slots, chains, sampling, uniform_BN, masks)
    while True:
        for chain in chains:
            chain.add_sure_guesses()
        asked, tokens = _worth_asking(chains, cost, masks)
        if not asked:
            return draws.result()
        draws.ask(asked, tokens)


def _worth_asking(chains: Sequence[Chain], cost: DraftCost, masks: int) -> tuple[list[int], int]:
    """The chains that the model drafts for next, and how many tokens of each.

    Sets `wants_catch_up` on chains that the model would draft for if their draft did not lag.
    """
    wanting = [chain for chain in chains if chain.takes_model_token]
    if any(chain.tokens for chain in chains):
        cost = cost._replace(per_step=0.0)
    tokens = tokens_worth_a_forward(wanting, cost, masks)
    if not tokens:
        return [], 0
    for chain in wanting:
        chain.wants_catch_up = chain.draft_lags
    asked = [
        b for b, chain in enumerate(chains) if chain.takes_model_token and not chain.draft_lags
    ]
    if len(asked) < len(wanting):
        tokens = tokens_worth_a_forward([chains[b] for b in asked], cost, masks)
    return (asked, tokens) if tokens else ([], 0)


DRAFTERS = (CascadeDrafter(), ParallelCascadeDrafter())
