"""One sequence's chain while it is drafted: by n-grams and, in a cascade, by the draft model.

A chain grows while its next token is likely enough to be accepted for what it costs. The estimates
come from the acceptance rate α of the model's tokens and from counts by evidence.

Whether a token is drawn may depend on the tokens before it and on other sequences. Once drawn it
stays: leaving it out because of what it is would change the distribution that it was drawn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from decoder.drafters.base import DraftGroup
from decoder.policy.draft_cost import NO_COST, DraftCost
from decoder.policy.token_acceptance import (
    Evidence,
    TokenAcceptance,
    confidence_bucket,
    draft_token,
)
from decoder.sequence.ngram_index import NgramGuess
from decoder.sequence.sequence import LiveSequence
from decoder.verification.token_tree import CHOSEN

# Prior: acceptance of a token drawn at a mask divided by that of the token before it.
MASK_ACCEPTANCE = 0.8
# The draft verifies a guess only if it is this likely to draw the guess and those before it.
MIN_AGREEMENT = 0.3
# A guess is added only if it is this likely to be accepted, even where a place costs nothing.
MIN_ACCEPTANCE = 0.01


@dataclass(slots=True)
class Chain:
    """A sequence's drafted tokens. "Accepted" probabilities include all tokens before."""

    context: list[int]
    cached: int  # tokens of context and chain that the draft's cache holds
    limit: int  # tokens of the chain, at most
    model_budget: int  # tokens that the model may still draw
    acceptance: float  # rate α of the model's tokens
    cost: DraftCost  # this sequence's share of what drafting costs the step
    rates: TokenAcceptance  # acceptance of the draft's tokens by evidence
    greedy: bool
    guess: Callable[[list[int]], NgramGuess | None]  # n-grams' token behind these drafted ones
    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # by token: draft distribution, or CHOSEN
    evidence: list[Evidence] = field(default_factory=list)  # by token
    # By token: probability that it is accepted, as estimated before it was drawn.
    accepted_before_draw: list[float] = field(default_factory=list)
    accepted: float = 1.0  # probability that all tokens so far are accepted
    drawn: int = 0  # tokens that the model drew
    draft_lags: bool = False  # too far for the model to draft in this step
    wants_catch_up: bool = False  # the model would have drafted, but the draft lags

    @classmethod
    def of(cls, seq: LiveSequence, limit: int, cost: DraftCost, group: DraftGroup) -> "Chain":
        """A sequence's empty chain. Where the request fixes γ, cost does not matter."""
        return cls(
            seq.tokens,
            seq.draft_cached,
            limit,
            group.spec.model_budget,
            seq.acceptance.rate,
            cost if seq.query.gamma is None else NO_COST,
            seq.draft.token_acceptance,
            seq.ngram_lookup.greedy,
            lambda drafted: seq.ngram_lookup.guess(seq.tokens, drafted),
            draft_lags=seq.draft_uncached > group.max_lag,
        )

    @property
    def fixed_length(self) -> bool:
        """Whether the request fixes how much to draft."""
        return self.cost is NO_COST

    @property
    def takes_model_token(self) -> bool:
        return self.model_budget > 0 and len(self.tokens) < self.limit

    @property
    def drawn_length(self) -> int:
        """Tokens up to the last one that was drawn. They stay in the chain."""
        for n in range(len(self.sources), 0, -1):
            if self.sources[n - 1] != CHOSEN:
                return n
        return 0

    @property
    def sure(self) -> float:
        """Acceptance from which a guess replaces the model's token.

        An accepted guess is followed by as many tokens as an accepted model token, itself included
        1 / (1 - α), and it saves a forward of the model.
        """
        rate = self.model_acceptance(0)
        return rate - self.cost.per_forward * (1 - rate)

    def model_acceptance(self, masks: int) -> float:
        """Acceptance rate of the model's token behind so many masks."""
        prior = (
            self.acceptance if masks == 0 else MASK_ACCEPTANCE * self.model_acceptance(masks - 1)
        )
        return self.rates.rate(Evidence(self.greedy, draft_token(masks), None), prior)

    def model_prospects(self, masks: int) -> list[float]:
        """Probabilities that the model's next tokens are accepted, if drawn in one forward."""
        prospects: list[float] = []
        accepted = self.accepted
        for n in range(min(1 + masks, self.model_budget, self.limit - len(self.tokens))):
            accepted *= self.model_acceptance(n)
            prospects.append(accepted)
        return prospects

    def add_sure_guesses(self) -> None:
        """Adds n-gram guesses that are as good as the model's tokens."""
        while self.takes_model_token and (guess := self.guess(self.tokens)) is not None:
            if (
                guess.acceptance < self.sure
                or self.accepted * guess.acceptance < self.cost.per_candidate
            ):
                return
            self._add_guess(guess)

    def accepted_at(self, place: int) -> float:
        """Probability that the token at a place is accepted; 0 where the chain is shorter.

        Extends the chain by a guess first, where it ends at that place.
        """
        if place == len(self.tokens) < self.limit:
            guess = self.guess(self.tokens)
            if guess is not None and (
                self.fixed_length or self.accepted * guess.acceptance >= MIN_ACCEPTANCE
            ):
                self._add_guess(guess)
        return self.accepted_before_draw[place] if place < len(self.tokens) else 0.0

    def guesses_ahead(self) -> list[int]:
        """Guesses of the model's next tokens. The model checks them all in one forward."""
        guesses: list[int] = []
        agreement = 1.0
        while len(guesses) < min(self.model_budget, self.limit - len(self.tokens)) - 1:
            guess = self.guess([*self.tokens, *guesses])
            if guess is None:
                break
            agreement *= guess.acceptance
            if agreement < MIN_AGREEMENT:
                break
            guesses.append(guess.token)
        return guesses

    def add_drawn(self, tokens: Sequence[int], probs: Sequence[float], masked: bool) -> int:
        """Adds the model's tokens, given the draft's probability of each.

        Returns how many were added: all, but of tokens drawn at masks only those worth their cost.
        """
        for n, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
            masks = n if masked else 0
            expected = self.model_acceptance(masks)
            if masks and self.accepted * expected < self.cost.per_candidate:
                return n
            evidence = Evidence(self.greedy, draft_token(masks), confidence_bucket(prob))
            rate = self.rates.rate(evidence, expected)
            self._add(token, self.drawn, evidence, expected, rate)
            self.drawn += 1
            self.model_budget -= 1
        return len(tokens)

    def _add_guess(self, guess: NgramGuess) -> None:
        self._add(guess.token, CHOSEN, guess.evidence, guess.acceptance, guess.acceptance)

    def _add(
        self, token: int, source: int, evidence: Evidence, expected: float, rate: float
    ) -> None:
        """`expected` is the token's acceptance before it was known, `rate` the one after."""
        self.tokens.append(token)
        self.sources.append(source)
        self.evidence.append(evidence)
        self.accepted_before_draw.append(self.accepted * expected)
        self.accepted *= rate
