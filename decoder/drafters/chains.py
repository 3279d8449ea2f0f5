"""Chains that are drafted as far as they are likely to be kept, by n-grams and, in a cascade, by a model.

Legend: B rows, N candidates of a row at most, Q drawn tokens of a row at most, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from decoder.drafters import Group
from decoder.evidence import ANY, DRAWN, SHARES, Evidence, Kept
from decoder.prices import FREE, Price
from decoder.proposal import CHOSEN, Proposal, Tree
from decoder.ragged import integers, ragged
from decoder.rows import Row
from decoder.shapes import chain
from decoder.suffixes import Guess
from online.messages import MAX_GAMMA

MASKED = 0.8  # how much less than the one before a mask's token is kept, where nothing is known
AHEAD = 0.3  # how likely the model's draws must have followed guesses for one more to be worth a place in its forward


@dataclass(slots=True)
class Chain:
    """One row's, as far as it is drafted."""

    context: list[int]
    held: int  # tokens of context and chain that the draft's slot holds
    most: int
    lead: int  # tokens of the model's, at most
    acceptance: float  # of the model's tokens, as far as is known without what follows
    price: Price
    known: Kept  # of the draft's tokens
    greedy: bool
    guess: Callable[[list[int]], Guess | None]  # what may follow these drafted tokens
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # by token: which drawn one it is, or CHOSEN
    evidence: list[Evidence] = field(default_factory=list)  # by token
    worth: list[float] = field(default_factory=list)  # by token: how likely it was to be kept, before it was drawn
    reach: float = 1.0  # how likely all are kept
    drawn: int = 0

    @classmethod
    def of(cls, row: Row, most: int, lead: int, price: Price) -> "Chain":
        """A request that says how much to draft has it, whatever that costs."""
        return cls(
            row.tokens,
            row.draft_cached,
            most,
            lead,
            row.acceptance.rate,
            price if row.query.gamma is None else FREE,
            row.draft.kept,
            row.suffixes.greedy,
            lambda drafted: row.suffixes.guess(row.tokens, drafted),
        )

    def choose(self, sure: bool) -> None:
        """N-grams' tokens: those they are sure of, or all that are likely enough to be kept."""
        while len(self.tokens) < self.most and (guess := self.guess(self.tokens)) is not None:
            if sure and self.lead and guess.kept < self.sure:
                return
            if self.reach * guess.kept < self.price.candidate:
                return
            self._add(guess.token, CHOSEN, guess.evidence, guess.kept, guess.kept)

    @property
    def sure(self) -> float:
        """How likely n-grams' token must be kept for the model not to be asked: where it is kept, as many follow either
        way, 1 / (1 − acceptance) with itself, and the model's forward is saved."""
        kept = self.expected(0)
        return kept - self.price.forward * (1 - kept)

    def expected(self, place: int) -> float:
        """How likely the model's token is kept; `place` is 0, or how many masks it stands behind."""
        evidence = self.greedy, DRAWN - place, ANY
        return self.known.rate(evidence, self.acceptance if place == 0 else MASKED * self.expected(place - 1))

    def wants_model(self) -> bool:
        worth = self.reach * self.expected(0)
        return self.lead > 0 and len(self.tokens) < self.most and worth >= self.price.forward + self.price.candidate

    def ahead(self) -> list[int]:
        """What n-grams think that the model will draw."""
        found: list[int] = []
        likely = 1.0
        while len(found) < min(self.lead, self.most - len(self.tokens)) - 1:
            if (guess := self.guess([*self.tokens, *found])) is None or (likely := likely * guess.kept) < AHEAD:
                break
            found.append(guess.token)
        return found

    def draw(self, tokens: Sequence[int], chances: Sequence[float], masked: bool) -> int:
        """The model's, and how likely it found them. Returns how many are taken: of masks', as many as are worth it."""
        for n, (token, chance) in enumerate(zip(tokens, chances, strict=True)):
            place = n if masked else 0
            expected, evidence = self.expected(place), (self.greedy, DRAWN - place, int(SHARES * chance))
            if place and self.reach * expected < self.price.candidate:
                return n
            self._add(token, self.drawn, evidence, expected, self.known.rate(evidence, expected))
            self.drawn, self.lead = self.drawn + 1, self.lead - 1
        return len(tokens)

    def _add(self, token: int, source: int, evidence: Evidence, expected: float, kept: float) -> None:
        self.tokens.append(token)
        self.sources.append(source)
        self.evidence.append(evidence)
        self.worth.append(self.reach * expected)
        self.reach *= kept


def longest(row: Row, most: int) -> int:
    """Candidates that a row may draft: these stop by themselves, and what n-grams are sure of costs next to nothing."""
    return MAX_GAMMA if most and row.query.gamma is None else most


def finished(chains: Sequence[Chain], logits_BQV: list[Tensor], probs_BQV: Tensor, group: Group) -> Proposal | None:
    """As a proposal, as long as the rows together make it worth while; None: there is nothing in it."""
    most = worthwhile(chains, group.price)
    group.drafted[:] = [min(len(one.tokens), most) for one in chains]
    group.evidence[:] = [[[spoke] for spoke in one.evidence] for one in chains]
    if not (most := max(group.drafted)):
        return None
    device = group.device
    tokens_BN, drafted_B = ragged([one.tokens[:most] for one in chains], device), integers(group.drafted, device)
    if all(one.sources == list(range(len(one.tokens))) for one in chains):
        return Proposal(tokens_BN, probs_BQV[:, :most], logits_BQV[:most], drafted_B)
    tree = Tree.of(chain(most), len(chains), False, device)
    sources_BN = ragged([one.sources[:most] for one in chains], device)
    return Proposal(tokens_BN, probs_BQV, logits_BQV, drafted_B, replace(tree, sources_BN=sources_BN))


def worthwhile(chains: Sequence[Chain], price: Price) -> int:
    """How long the longest is to be: a candidate of one row's has a place in the forward of all.

    What a drawn token is does not decide whether it stays: that would be to draw from something else.
    """
    free = [len(one.tokens) for one in chains if one.price is FREE]
    most, longest = max(free, default=0), max(len(one.tokens) for one in chains)
    while most < longest:
        gain = sum(one.worth[most] for one in chains if len(one.tokens) > most)
        if gain < price.candidate * len(chains):
            break
        most += 1
    return most
