"""A chain of which the draft model drafts the beginning, in fewer forwards than tokens, and n-grams the rest.

Cascade Speculative Drafting (arXiv 2312.11462). Vertically (section 3.1) n-grams guess the model's tokens and it looks
at several at once, in the one form that is exact at any temperature: the model draws token after token with the very
uniforms of an ordinary chain, and a guess only decides whether the next distribution is there already. So the lead, its
distributions, and all that verification sees of them are those of `decoder/drafters/model.py`, whatever is guessed.
Horizontally (section 3.2) the dearer drafter has the early positions, on which all others depend: behind its lead
follows what n-grams continue it with, which costs nothing and counts as chosen.

Legend: B rows, M positions of a forward that a token is drawn from, N drafted tokens of a row at most, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from decoder.drafters import Group
from decoder.models import LanguageModel
from decoder.proposal import CHOSEN, Proposal, Tree
from decoder.ragged import integers, ragged
from decoder.rows import Row
from decoder.sampling import Sampling, at_least_float32, most_likely, probabilities, sample
from decoder.shapes import Scheme, chain, chain_of
from decoder.slots import Rows

TAIL = 2  # tokens that must have occurred before in this order, for what followed them to be drafted behind the lead
Guess = Callable[[int, list[int], int], list[int]]  # of a row that has drafted these tokens, so many more at most


class CascadeDrafter:
    """A `Drafter` of chains."""

    uses_model = True

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        if row.query.gamma is not None:
            return replace(chain_of(most, "cascade"), lead=(most + 1) // 2)
        return replace(chain_of(most if gamma else 0, "cascade"), lead=gamma)

    def propose(self, group: Group) -> Proposal:
        rows = group.rows

        def guess(row: int, drafted: list[int], count: int) -> list[int]:
            return rows[row].suffixes.continuation(rows[row].tokens, drafted, count)

        contexts, cached = [row.tokens for row in rows], [row.draft_cached for row in rows]
        leads = [min(group.scheme.lead, count) for count in group.drafted]
        drawn = leads, group.sampling, group.uniform_BN
        proposal, chains, held = propose(group.draft.model, group.slots, contexts, cached, *drawn, guess)
        for row, count in zip(rows, held, strict=True):
            row.draft_holds(count)  # cut back where a rejection comes earlier
        asked = zip(rows, chains, group.drafted, strict=True)
        tails = [row.suffixes.continuation(row.tokens, led, count - len(led), TAIL) for row, led, count in asked]
        return extended(proposal, chains, tails, group)

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        pass


def propose(
    model: LanguageModel,
    rows: Rows,
    contexts: Sequence[list[int]],
    cached: Sequence[int],
    drafted: Sequence[int],
    sampling: Sampling,
    uniform_BN: Tensor,
    guess: Guess,
) -> tuple[Proposal, list[list[int]], list[int]]:
    """The model's chains, twice, and how much of each row's context and chain the draft's slots then hold.

    Of the contexts the first `cached` tokens are in the slots, and never all.
    """
    device, count, most = uniform_BN.device, len(contexts), max(drafted)
    chains: list[list[int]] = [[] for _ in contexts]
    held = list(cached)
    logits_BNV = probs_BNV = torch.empty(0)
    while any(len(chain) < wanted for chain, wanted in zip(chains, drafted, strict=True)):
        missing = [wanted - len(chain) for chain, wanted in zip(chains, drafted, strict=True)]
        guesses = [guess(b, chains[b], missing[b] - 1) if missing[b] > 1 else [] for b in range(count)]
        unseen = [[*contexts[b], *chains[b]][held[b] :] for b in range(count)]
        fed = [unseen[b] + guesses[b] for b in range(count)]
        upto = max(start + len(tokens) for start, tokens in zip(held, fed, strict=True))
        logits_BFV = at_least_float32(model.forward(rows, ragged(fed, device), integers(held, device), upto))
        if not len(logits_BNV):
            logits_BNV = logits_BFV.new_zeros((count, most, logits_BFV.shape[-1]))
            probs_BNV = logits_BNV[:, :0] if sampling.all_greedy else torch.zeros_like(logits_BNV)
        for b in range(count):
            if missing[b]:
                done, first = len(chains[b]), len(unseen[b]) - 1
                own_1MV = logits_BFV[b : b + 1, first : first + 1 + len(guesses[b])]
                drawn, q_1MV = _draw(
                    own_1MV, sampling.select([b]), uniform_BN[b : b + 1, done : done + own_1MV.shape[1]]
                )
                taken = 1 + _agreement(drawn, guesses[b])
                logits_BNV[b, done : done + taken] = own_1MV[0, :taken]
                if not sampling.all_greedy:
                    probs_BNV[b, done : done + taken] = q_1MV[0, :taken]
                chains[b] += drawn[:taken]
                held[b] += len(unseen[b]) + taken - 1
    logits = [logits_BNV[:, n : n + 1] for n in range(most)]
    return Proposal(ragged(chains, device), probs_BNV, logits, integers(list(drafted), device)), chains, held


def extended(lead: Proposal, chains: list[list[int]], tails: list[list[int]], group: Group) -> Proposal:
    """With what n-grams continue the rows' chains with, where they do."""
    group.drafted[:] = [len(led) + len(tail) for led, tail in zip(chains, tails, strict=True)]
    if not any(tails):
        return lead
    tree = Tree.of(chain(max(group.drafted)), len(chains), False, group.device)
    chosen_BN = torch.arange(max(group.drafted), device=group.device) >= lead.drafted_B[:, None]
    return replace(
        lead,
        tokens_BN=ragged([led + tail for led, tail in zip(chains, tails, strict=True)], group.device),
        drafted_B=integers(group.drafted, group.device),
        tree=replace(tree, sources_BN=torch.where(chosen_BN, CHOSEN, tree.sources_BN)),
    )


def _draw(logits_1MV: Tensor, sampling: Sampling, uniform_1M: Tensor) -> tuple[list[int], Tensor]:
    """A token from each position, as if the ones before were the right ones."""
    if sampling.all_greedy:
        drawn: list[int] = most_likely(logits_1MV)[0].tolist()
        return drawn, logits_1MV
    probs_1MV = probabilities(logits_1MV, sampling)
    drawn = sample(probs_1MV, uniform_1M)[0].tolist()
    return drawn, probs_1MV


def _agreement(drawn: Sequence[int], guesses: Sequence[int]) -> int:
    """Guesses that were drawn."""
    agreed = 0
    while agreed < len(guesses) and drawn[agreed] == guesses[agreed]:
        agreed += 1
    return agreed
