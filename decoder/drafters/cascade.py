"""A chain of which n-grams draft what they are sure of, the draft model what is worth its while, and n-grams the rest.

Cascade Speculative Drafting (arXiv 2312.11462). Horizontally (section 3.2) the dearer drafter has the early positions,
on which all others depend, and cheaper ones follow; here the cheaper one has early ones, too, where it is as good: a
token that n-grams are about as sure of as the model usually is needs no forward. Vertically (section 3.1) n-grams guess
the model's tokens and it looks at several at once, in the one form that is exact at any temperature: the model draws
token after token with the very uniforms of an ordinary chain, and a guess only decides whether the next distribution is
there already.

A token is drafted as long as it is likely enough to be kept for what it costs, and what is known of that are the
acceptance of the model's tokens and how often guesses like this one were kept: a stop that is learnt while it serves.
All of it depends on nothing but the tokens before; that is what verification asks for.

Legend: B rows, M positions of a forward that a token is drawn from, Q drawn tokens of a row at most, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decoder.drafters import Group, learn
from decoder.drafters.chains import Chain, finished, longest
from decoder.models import LanguageModel
from decoder.proposal import Proposal
from decoder.ragged import integers, ragged
from decoder.rows import Row
from decoder.sampling import Sampling, at_least_float32, most_likely, probabilities, sample
from decoder.shapes import Scheme, chain_of
from decoder.slots import Rows


class CascadeDrafter:
    """A `Drafter` of chains."""

    uses_model = True

    def __init__(self, masks: int = 0) -> None:
        """`masks` is how many more tokens the model drafts in the same forward, by mask tokens."""
        self._masks = masks

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        most = longest(row, most)
        return replace(
            chain_of(most, "parallel_cascade" if self._masks else "cascade"),
            lead=most if row.query.gamma is None else (most + 1) // 2,
        )

    def propose(self, group: Group) -> Proposal | None:
        asked = zip(group.rows, group.drafted, strict=True)
        chains = [Chain.of(row, count, group.scheme.lead, group.price) for row, count in asked]
        drawn = propose(group.draft.model, group.slots, chains, group.sampling, group.uniform_BN, self._masks)
        logits_BQV, probs_BQV, group.forwards = drawn
        for row, one in zip(group.rows, chains, strict=True):
            row.draft_holds(one.held)  # cut back where a rejection comes earlier
        return finished(chains, logits_BQV, probs_BQV, group)

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        learn(group, kept)


def propose(
    model: LanguageModel,
    rows: Rows,
    chains: Sequence[Chain],
    sampling: Sampling,
    uniform_BN: Tensor,
    masks: int = 0,
) -> tuple[list[Tensor], Tensor, int]:
    """Drafts the chains. Returns what the model's tokens were drawn from, [B, 1, V] each and [B, Q, V], and how often
    it was asked.

    Of the contexts the first `held` tokens are in the slots, and never all.
    """
    device, count, forwards = uniform_BN.device, len(chains), 0
    said: list[list[Tensor]] = [[] for _ in chains]
    probs: list[list[Tensor]] = [[] for _ in chains]
    own = [sampling if count == 1 else sampling.select([b]) for b in range(count)]
    while True:
        for one in chains:
            one.choose(sure=True)
        asking = [b for b, one in enumerate(chains) if one.wants_model()]
        if not asking:
            break
        ahead = [_ahead(one, masks, model.mask_id) if b in asking else [] for b, one in enumerate(chains)]
        unseen = [[*one.context, *one.tokens][one.held :] for one in chains]
        fed = [tokens + more for tokens, more in zip(unseen, ahead, strict=True)]
        held = [one.held for one in chains]
        upto = max(start + len(tokens) for start, tokens in zip(held, fed, strict=True))
        logits_BFV = at_least_float32(model.forward(rows, ragged(fed, device), integers(held, device), upto))
        forwards += 1
        for b, one in enumerate(chains):
            one.held += len(unseen[b])
            if b in asking:
                done, first = len(one.tokens), len(unseen[b]) - 1
                own_1MV = logits_BFV[b : b + 1, first : first + 1 + len(ahead[b])]
                drawn, chances, q_1MV = _draw(own_1MV, own[b], uniform_BN[b : b + 1, done : done + own_1MV.shape[1]])
                taken = len(drawn) if masks else 1 + _agreement(drawn, ahead[b])
                taken = one.draw(drawn[:taken], chances[:taken], masked=masks > 0)
                said[b].append(own_1MV[0, :taken])
                probs[b].append(q_1MV[0, :taken])
                one.held += 0 if masks else taken - 1
    for one in chains:
        one.choose(sure=False)
    most = max(one.drawn for one in chains)
    if not most:
        return [], torch.empty((count, 0, model.vocab_size), device=device), forwards
    logits_BQV = _stacked(said, most)
    probs_BQV = logits_BQV[:, :0] if sampling.all_greedy else _stacked(probs, most)
    return [logits_BQV[:, q : q + 1] for q in range(most)], probs_BQV, forwards


def _ahead(one: Chain, masks: int, mask_id: int) -> list[int]:
    """What the model is fed behind the chain: guesses of its own tokens, or masks that stand for them."""
    return [mask_id] * min(masks, one.lead - 1, one.most - len(one.tokens) - 1) if masks else one.ahead()


def _stacked(parts: Sequence[list[Tensor]], most: int) -> Tensor:
    """Rows of [M, V] pieces as one padded [B, Q, V]."""
    rows = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in parts if pieces]
    if len(rows) == len(parts) == 1:
        return rows[0][None]
    found_BQV = rows[0].new_zeros((len(parts), most, rows[0].shape[-1]))
    whole = iter(rows)
    for b, pieces in enumerate(parts):
        if pieces:
            row_QV = next(whole)
            found_BQV[b, : len(row_QV)] = row_QV
    return found_BQV


def _draw(logits_1MV: Tensor, sampling: Sampling, uniform_1M: Tensor) -> tuple[list[int], list[float], Tensor]:
    """A token from each position, as if the ones before were the right ones; how likely each was, and all others."""
    if sampling.all_greedy:
        probs_1MV, drawn_1M = logits_1MV.softmax(-1), most_likely(logits_1MV)
    else:
        probs_1MV = probabilities(logits_1MV, sampling)
        drawn_1M = sample(probs_1MV, uniform_1M)
    chances = probs_1MV.gather(-1, drawn_1M[..., None]).flatten().tolist()
    return drawn_1M[0].tolist(), chances, probs_1MV


def _agreement(drawn: Sequence[int], guesses: Sequence[int]) -> int:
    """Guesses that were drawn."""
    agreed = 0
    while agreed < len(guesses) and drawn[agreed] == guesses[agreed]:
        agreed += 1
    return agreed
