"""Chains that are drafted as far as they are likely to be kept, by n-grams and, in a cascade, by a model.

Legend: B sequences, N candidates of a sequence at most, Q drawn tokens of a sequence at most, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from torch import Tensor

from decoder.drafters.base import DraftGroup
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import (
    Evidence,
    TokenAcceptance,
    confidence_bucket,
    draft_token,
)
from decoder.sequence.ngram_index import NgramGuess
from decoder.sequence.sequence import LiveSequence
from decoder.verification.proposal import CHOSEN, Proposal, Tree
from decoder.verification.tree_shape import chain_shape
from online.messages import MAX_GAMMA

MASKED = 0.8  # how much less than the one before a mask's token is kept, where nothing is known
AHEAD = 0.3  # how likely the model's draws must have followed guesses for one more to be worth a place in its forward
LITTLE = 0.01  # how likely a token must be kept to be added, whoever pays for its place


@dataclass(slots=True)
class Chain:
    """One sequence's, as far as it is drafted.

    Whether a token is drawn may depend on the tokens before it and on other sequences; what becomes of one that has been
    drawn, on nothing that it had a part in: to leave it out for what it is would be to draw from something else.
    """

    context: list[int]
    held: int  # tokens of context and chain that the draft's slot holds
    most: int
    lead: int  # tokens of the model's, at most
    acceptance: float  # of the model's tokens, as far as is known without what follows
    share: DraftCost  # of what the step costs
    known: TokenAcceptance  # of the draft's tokens
    greedy: bool
    guess: Callable[[list[int]], NgramGuess | None]  # what may follow these drafted tokens
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # by token: which drawn one it is, or CHOSEN
    evidence: list[Evidence] = field(default_factory=list)  # by token
    worth: list[float] = field(
        default_factory=list
    )  # by token: how likely it was to be kept, before it was drawn
    reach: float = 1.0  # how likely all are kept
    drawn: int = 0
    lags: bool = False  # the draft's slot lacks too much of the context for the model to be asked in this step
    missed: bool = False  # it lags, and the model would have been asked

    @classmethod
    def of(cls, seq: LiveSequence, most: int, share: DraftCost, group: DraftGroup) -> "Chain":
        """A request that says how much to draft has it, whatever that costs."""
        return cls(
            seq.tokens,
            seq.draft_cached,
            most,
            group.spec.lead,
            seq.acceptance.rate,
            share if seq.query.gamma is None else NO_COST,
            seq.draft.token_acceptance,
            seq.ngram_lookup.greedy,
            lambda drafted: seq.ngram_lookup.guess(seq.tokens, drafted),
            lags=seq.draft_uncached > group.feed,
        )

    @property
    def asked(self) -> bool:
        """Whether the request says how much to draft."""
        return self.share is NO_COST

    @property
    def open(self) -> bool:
        """Whether there is room for another token of the model's."""
        return self.lead > 0 and len(self.tokens) < self.most

    def choose(self) -> None:
        """Tokens that n-grams are sure of, before the model is asked."""
        while self.open and (guess := self.guess(self.tokens)) is not None:
            if (
                guess.acceptance < self.sure
                or self.reach * guess.acceptance < self.share.per_candidate
            ):
                return
            self._add(guess.token, CHOSEN, guess.evidence, guess.acceptance, guess.acceptance)

    @property
    def sure(self) -> float:
        """How likely n-grams' token must be kept for the model not to be asked: where it is kept, as many follow either
        way, 1 / (1 − acceptance) with itself, and the model's forward is saved."""
        kept = self.expected(0)
        return kept - self.share.per_forward * (1 - kept)

    @property
    def fixed(self) -> int:
        """Tokens up to the last one that was drawn: they stay."""
        return next(
            (n for n in range(len(self.sources), 0, -1) if self.sources[n - 1] != CHOSEN), 0
        )

    def grown(self, place: int) -> float:
        """How likely the token there was to be kept before it was drawn; where the chain ends, n-grams go on first."""
        guess = self.guess(self.tokens) if place == len(self.tokens) < self.most else None
        if guess is not None and (self.asked or self.reach * guess.acceptance >= LITTLE):
            self._add(guess.token, CHOSEN, guess.evidence, guess.acceptance, guess.acceptance)
        return self.worth[place] if place < len(self.tokens) else 0.0

    def expected(self, place: int) -> float:
        """How likely the model's token is kept; `place` is 0, or how many masks it stands behind."""
        evidence = Evidence(self.greedy, draft_token(place), None)
        return self.known.rate(
            evidence, self.acceptance if place == 0 else MASKED * self.expected(place - 1)
        )

    def promises(self, masks: int) -> list[float]:
        """How likely tokens would be kept that the model, asked now, drew one behind another."""
        found, reach = [], self.reach
        for place in range(min(1 + masks, self.lead, self.most - len(self.tokens))):
            reach *= self.expected(place)
            found.append(reach)
        return found

    def ahead(self) -> list[int]:
        """What n-grams think that the model will draw."""
        found: list[int] = []
        likely = 1.0
        while len(found) < min(self.lead, self.most - len(self.tokens)) - 1:
            if (guess := self.guess([*self.tokens, *found])) is None or (
                likely := likely * guess.acceptance
            ) < AHEAD:
                break
            found.append(guess.token)
        return found

    def draw(self, tokens: Sequence[int], chances: Sequence[float], masked: bool) -> int:
        """The model's, and how likely it found them. Returns how many are taken: of masks', as many as are worth it."""
        for n, (token, chance) in enumerate(zip(tokens, chances, strict=True)):
            place = n if masked else 0
            expected, evidence = (
                self.expected(place),
                Evidence(self.greedy, draft_token(place), confidence_bucket(chance)),
            )
            if place and self.reach * expected < self.share.per_candidate:
                return n
            self._add(token, self.drawn, evidence, expected, self.known.rate(evidence, expected))
            self.drawn, self.lead = self.drawn + 1, self.lead - 1
        return len(tokens)

    def _add(
        self, token: int, source: int, evidence: Evidence, expected: float, kept: float
    ) -> None:
        self.tokens.append(token)
        self.sources.append(source)
        self.evidence.append(evidence)
        self.worth.append(self.reach * expected)
        self.reach *= kept


def begun(group: DraftGroup) -> list[Chain]:
    """The sequences', before anything is drafted."""
    share = group.price.scaled(1 / len(group.seqs))
    return [
        Chain.of(seq, most, share, group)
        for seq, most in zip(group.seqs, group.drafted, strict=True)
    ]


def longest(seq: LiveSequence, most: int) -> int:
    """Candidates that a sequence may draft: these stop by themselves, and what n-grams are sure of costs next to nothing."""
    return MAX_GAMMA if most and seq.query.gamma is None else most


def finished(
    chains: Sequence[Chain], logits_BQV: list[Tensor], probs_BQV: Tensor, group: DraftGroup
) -> Proposal | None:
    """As a proposal, with what n-grams add; None: there is nothing in it."""
    most = complete(chains, group.price)
    group.drafted[:] = [min(len(one.tokens), most) for one in chains]
    group.evidence[:] = [[[spoke] for spoke in one.evidence] for one in chains]
    if not (most := max(group.drafted)):
        return None
    device = group.device
    tokens_BN, drafted_B = (
        ragged([one.tokens[:most] for one in chains], device),
        integers(group.drafted, device),
    )
    if all(one.sources[:most] == list(range(len(one.tokens[:most]))) for one in chains):
        return Proposal(tokens_BN, probs_BQV[:, :most], logits_BQV[:most], drafted_B)
    tree = Tree.of(chain_shape(most), len(chains), False, device)
    sources_BN = ragged([one.sources[:most] for one in chains], device)
    return Proposal(
        tokens_BN, probs_BQV, logits_BQV, drafted_B, replace(tree, sources_BN=sources_BN)
    )


def complete(chains: Sequence[Chain], price: DraftCost) -> int:
    """N-grams go on for as long as a candidate is worth its place: one sequence's has a place in the forward of all. Returns
    how long the longest is to be."""
    most, gain, fixed = 0, 0.0, max(one.fixed for one in chains)
    while worth := sum(one.grown(most) for one in chains):
        asked = most < fixed or any(one.asked and most < len(one.tokens) for one in chains)
        if worth < price.per_candidate and not asked:
            break
        most, gain = most + 1, gain + worth - price.per_candidate
    return most if fixed or gain >= price.per_step or any(one.asked for one in chains) else 0


def worthwhile(chains: Sequence[Chain], price: DraftCost, masks: int) -> int:
    """How many more tokens of each a forward of the model is worth asking for: one, and masks' behind it, or none.
    Where nothing is drafted yet, `price` has a start."""
    if any(one.asked for one in chains):
        return 1 + masks
    worth = [
        sum(place) for place in zip_longest(*(one.promises(masks) for one in chains), fillvalue=0.0)
    ]
    gains = [
        one - price.per_candidate for one in worth if one >= price.per_candidate
    ]  # they only get smaller
    return len(gains) if sum(gains) >= price.per_forward + price.per_step else 0
