"""A chain of which n-grams draft what they are sure of, the draft model what is worth its while, and n-grams the rest.

Cascade Speculative Drafting (arXiv 2312.11462). Horizontally (section 3.2) the dearer drafter has the early positions,
on which all others depend, and cheaper ones follow; here the cheaper one has early ones, too, where it is as good: a
token that n-grams are about as sure of as the model usually is needs no forward. Vertically (section 3.1) n-grams guess
the model's tokens and it looks at several at once, in the one form that is exact at any temperature: the model draws
token after token with the very uniforms of an ordinary chain, and a guess only decides whether the next distribution is
there already.

A token is drafted as long as it is likely enough to be kept for what it costs, and what is known of that are the
acceptance of the model's tokens and how often guesses like this one were kept: a stop that is learnt while it serves.
All of it depends on nothing but the tokens before and on other sequences; that is what verification asks for.

Legend: B sequences, M positions of a forward that a token is drawn from, Q drawn tokens of a sequence at most, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decoder.drafters.base import DraftGroup, learn
from decoder.drafters.chain import Chain, begun, finished, longest, worthwhile
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import (
    Sampling,
    at_least_float32,
    most_likely,
    probabilities,
    sample,
)


class CascadeDrafter:
    """A `Drafter` of chains."""

    uses_model, waits = True, False

    def __init__(self, masks: int = 0) -> None:
        """`masks` is how many more tokens the model drafts in the same forward, by mask tokens."""
        self._masks = masks

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        most = longest(seq, most)
        return replace(
            chain_spec(most, "parallel_cascade" if self._masks else "cascade"),
            lead=most if seq.query.gamma is None else (most + 1) // 2,
        )

    def propose(self, group: DraftGroup) -> Proposal | None:
        chains = begun(group)
        shaped = group.sampling, group.uniform_BN, group.price, self._masks
        logits_BQV, probs_BQV, group.forwards = propose(
            group.draft.model, group.slots, chains, *shaped
        )
        for seq, one in zip(group.seqs, chains, strict=True):
            seq.set_draft_cached(one.held)  # cut back where a rejection comes earlier
            seq.wants_catch_up = one.missed
        return finished(chains, logits_BQV, probs_BQV, group)

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        learn(group, kept)


def propose(
    model: LanguageModel,
    seqs: Slots,
    chains: Sequence[Chain],
    sampling: Sampling,
    uniform_BN: Tensor,
    price: DraftCost = NO_COST,
    masks: int = 0,
) -> tuple[list[Tensor], Tensor, int]:
    """Drafts the chains. Returns what the model's tokens were drawn from, [B, 1, V] each and [B, Q, V], and how often
    it was asked.

    Of the contexts the first `held` tokens are in the slots, and never all.
    """
    device, count, forwards = uniform_BN.device, len(chains), 0
    said: list[list[Tensor]] = [[] for _ in chains]
    probs: list[list[Tensor]] = [[] for _ in chains]
    while True:
        for one in chains:
            one.choose()
        asking, places = _asking(chains, price, masks)
        if not asking:
            break
        ahead = [
            _ahead(one, places, model.mask_id, masks) if b in asking else []
            for b, one in enumerate(chains)
        ]
        unseen = [[] if one.lags else [*one.context, *one.tokens][one.held :] for one in chains]
        fed = [tokens + more for tokens, more in zip(unseen, ahead, strict=True)]
        held = [one.held for one in chains]
        upto = max(start + len(tokens) for start, tokens in zip(held, fed, strict=True))
        logits_BFV = at_least_float32(
            model.forward(seqs, ragged(fed, device), integers(held, device), upto)
        )
        forwards += 1
        for one, tokens in zip(chains, unseen, strict=True):
            one.held += len(tokens)
        behind = [slice(len(unseen[b]) - 1, len(fed[b])) for b in asking]
        said_AMV = _stacked([[logits_BFV[b, at]] for b, at in zip(asking, behind, strict=True)])
        everyone = len(asking) == count
        own = sampling if everyone else sampling.select(asking)
        uniform_AN = uniform_BN if everyone else uniform_BN[asking]
        drawn, chances, q_AMV = _draw(
            said_AMV, own, uniform_AN, [len(chains[b].tokens) for b in asking]
        )
        for a, b in enumerate(asking):
            taken = 1 + (len(ahead[b]) if masks else _agreement(drawn[a], ahead[b]))
            taken = chains[b].draw(drawn[a][:taken], chances[a][:taken], masked=masks > 0)
            said[b].append(said_AMV[a, :taken])
            probs[b].append(q_AMV[a, :taken])
            chains[b].held += 0 if masks else taken - 1
    if not forwards:
        return [], torch.empty((count, 0, model.vocab_size), device=device), 0
    logits_BQV = _stacked(said)
    probs_BQV = logits_BQV[:, :0] if sampling.all_greedy else _stacked(probs)
    return [logits_BQV[:, q : q + 1] for q in range(logits_BQV.shape[1])], probs_BQV, forwards


def _asking(chains: Sequence[Chain], price: DraftCost, masks: int) -> tuple[list[int], int]:
    """The chains that the model drafts for next, and how many tokens of each it is asked for. All sequences of a step take
    the time of its forward: they share it."""
    wanting = [one for one in chains if one.open]
    if any(one.tokens for one in chains):
        price = price._replace(per_step=0.0)
    if not (places := worthwhile(wanting, price, masks)):
        return [], 0
    for one in wanting:
        one.missed = one.lags
    asking = [b for b, one in enumerate(chains) if one.open and not one.lags]
    if len(asking) < len(wanting) and not (
        places := worthwhile([chains[b] for b in asking], price, masks)
    ):
        return [], 0
    return asking, places


def _ahead(one: Chain, places: int, mask_id: int, masks: int) -> list[int]:
    """What the model is fed behind the chain: guesses of its own tokens, or masks that stand for them."""
    return (
        [mask_id] * (min(places, one.lead, one.most - len(one.tokens)) - 1)
        if masks
        else one.ahead()
    )


def _stacked(parts: Sequence[list[Tensor]]) -> Tensor:
    """Sequences of [M, V] pieces as one padded [B, Q, V]."""
    seqs = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in parts if pieces]
    if len(seqs) == len(parts) == 1:
        return seqs[0][None]
    found_BQV = seqs[0].new_zeros((len(parts), max(map(len, seqs)), seqs[0].shape[-1]))
    whole = iter(seqs)
    for b, pieces in enumerate(parts):
        if pieces:
            row_QV = next(whole)
            found_BQV[b, : len(row_QV)] = row_QV
    return found_BQV


def _draw(
    logits_AMV: Tensor, sampling: Sampling, uniform_AN: Tensor, done: list[int]
) -> tuple[list[list[int]], list[list[float]], Tensor]:
    """A token from each position, as if the ones before were the right ones, by the sequence's uniforms from `done` on; how
    likely each was, and all others."""
    if sampling.all_greedy:
        probs_AMV, drawn_AM = logits_AMV.softmax(-1), most_likely(logits_AMV)
    else:
        probs_AMV = probabilities(logits_AMV, sampling)
        places_M = torch.arange(logits_AMV.shape[1], device=uniform_AN.device)
        at_AM = (integers(done, uniform_AN.device)[:, None] + places_M).clamp_(
            max=uniform_AN.shape[1] - 1
        )  # padding
        drawn_AM = sample(probs_AMV, uniform_AN.gather(1, at_AM))
    chances_AM = probs_AMV.gather(-1, drawn_AM[..., None])[..., 0]
    return drawn_AM.tolist(), chances_AM.tolist(), probs_AMV


def _agreement(drawn: Sequence[int], guesses: Sequence[int]) -> int:
    """Guesses that were drawn."""
    agreed = 0
    while agreed < len(guesses) and drawn[agreed] == guesses[agreed]:
        agreed += 1
    return agreed
