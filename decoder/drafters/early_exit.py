"""A chain from a draft that says what it thinks after each of its layers, and goes deeper where that is worth it.

Sorted Speculative Decoding (S2D, arXiv 2407.01955): the first layers of the draft, with its own head, are drafts
themselves. Behind each of them a token may be drawn, by how sure the draft is there: what was kept of tokens that were
drawn at such an exit is known, and what of those that went deeper, and another layer has a price. Behind a small target
it is a dear one. A layer that was left out for some tokens is computed for all of them at once when a later one needs
it; those that nobody needed are fed again, as tokens are that the cache lacks. What is drawn from is what verification
is told, and the decision knows nothing of what is drawn: exact, whatever the exits are worth. What they learn is in
`trainer/distill.py`.

Legend: B sequences, N drafted tokens of a sequence at most, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decoder.drafters.base import DraftGroup, begin, keep, learn
from decoder.models.base import LayeredModel
from decoder.models.hidden import HiddenStates
from decoder.models.ragged import integers
from decoder.policy.token_acceptance import (
    Evidence,
    TokenAcceptance,
    confidence_bucket,
    exit_passed,
    exit_taken,
)
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import DraftSpec, chain_spec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32, most_likely, probabilities, sample


class ExitDrafter:
    """A `Drafter` of chains. A draft whose layers can't be had one by one drafts as a whole."""

    uses_model = waits = True

    def spec(self, seq: LiveSequence, gamma: int, most: int) -> DraftSpec:
        return chain_spec(gamma, "exits")

    def propose(self, group: DraftGroup) -> Proposal:
        said = [at_least_float32(begin(group))]
        probs: list[Tensor] = []
        tokens: list[Tensor] = []
        ladder = _Ladder(group)
        for n in range(max(group.drafted)):
            if n:
                said.append(at_least_float32(ladder.climb(tokens[-1])))
            if group.sampling.all_greedy:
                tokens.append(most_likely(said[-1]))
            else:
                probs.append(probabilities(said[-1], group.sampling))
                tokens.append(sample(probs[-1], group.uniform_BN[:, n : n + 1]))
        group.cells[:] = [{n: n for n in range(ladder.whole)}] * len(group.seqs)
        group.evidence[:] = [choice.evidence for choice in ladder.choices]
        group.forwards = 1 + ladder.forwards
        probs_BNV = torch.cat(probs, 1) if probs else said[0][:, :0]
        return Proposal(
            torch.cat(tokens, 1), probs_BNV, said, integers(group.drafted, group.device)
        )

    def settle(self, group: DraftGroup, kept: Sequence[Sequence[int]]) -> None:
        keep(group, kept)
        learn(group, kept)


@dataclass(slots=True)
class _Choice:
    """A sequence's, of the exits that its tokens leave by."""

    known: TokenAcceptance
    greedy: bool
    acceptance: float
    drafted: int
    reach: float  # how likely all tokens are kept
    climbs: bool = False  # the last one, so far
    kept: float = 0.0  # how likely that one is
    ways: list[tuple[Evidence, float]] = field(
        default_factory=list
    )  # to leave and to climb, and how likely it is then
    evidence: list[list[Evidence]] = field(
        default_factory=lambda: [[]]
    )  # by token; the first one has all layers

    @classmethod
    def of(cls, seq: LiveSequence, drafted: int) -> "_Choice":
        rate = seq.acceptance.rate
        return cls(seq.draft.token_acceptance, seq.query.temperature == 0, rate, drafted, rate)

    def begin(self) -> None:
        """Another token."""
        self.reach *= self.kept if len(self.evidence) > 1 else 1.0
        self.climbs, self.kept = True, self.acceptance
        self.evidence.append([])

    def gain(self, passed: int, sure: float) -> float:
        """Tokens that going deeper promises; `sure` is the probability of the likeliest token behind so many layers."""
        confidence = confidence_bucket(sure)
        evidence = [
            Evidence(self.greedy, source(passed), confidence)
            for source in (exit_taken, exit_passed)
        ]
        # Unless known, any exit is as good as the whole draft: so it is tried.
        self.ways = [(one, self.known.rate(one, self.acceptance)) for one in evidence]
        (_, here), (_, deeper) = self.ways
        following = sum(self.acceptance**n for n in range(self.drafted - len(self.evidence) + 1))
        return max(0.0, deeper - here) * self.reach * following

    def decide(self, climbs: bool) -> bool:
        self.climbs, (evidence, self.kept) = climbs, self.ways[climbs]
        self.evidence[-1].append(evidence)
        return climbs


class _Ladder:
    """How deep each drafted token has come."""

    def __init__(self, group: DraftGroup) -> None:
        self._group, self._model = group, group.draft.model
        self._start = [len(seq.tokens) for seq in group.seqs]
        self._waiting: dict[
            int, HiddenStates
        ] = {}  # tokens that have left after so many layers, one behind another
        self._fed = 0
        self.whole = 0  # tokens that have passed all layers
        self.forwards = 0.0  # of the draft: a layer, with what it says, is a part of one
        self.choices = [
            _Choice.of(seq, count) for seq, count in zip(group.seqs, group.drafted, strict=True)
        ]

    def climb(self, token_B1: Tensor) -> Tensor:
        """What is drawn from behind the token, [B, 1, V]."""
        self._fed += 1
        for choice in self.choices:
            choice.begin()
        if not isinstance(self._model, LayeredModel):
            self.whole, self.forwards = self._fed, self.forwards + 1
            starts_B = integers(
                [start + self._fed - 1 for start in self._start], self._group.device
            )
            return self._model.forward(
                self._group.slots, token_B1, starts_B, max(self._start) + self._fed
            )
        layers, passed = self._model.num_layers, 1
        tokens = self._pass(self._model.embed(token_B1), 0)
        said_B1V = self._model.exit_logits(tokens.last)
        while passed < layers and any(climb := self._climb(passed, said_B1V)):
            tokens = self._pass(tokens.after(self._waiting.pop(passed, None)), passed)
            passed += 1
            # A sequence leaves where it is to, however deep the others of its batch go.
            climb_B11 = torch.tensor(climb, device=said_B1V.device)[:, None, None]
            said_B1V = torch.where(climb_B11, self._model.exit_logits(tokens.last), said_B1V)
        if passed < layers:
            self._waiting[passed] = tokens.after(self._waiting.get(passed))
        else:
            self.whole = self._fed
        return said_B1V

    def _climb(self, passed: int, said_B1V: Tensor) -> list[bool]:
        """By sequence, whether its token goes deeper: where the sequences together gain what a layer costs all of them."""
        sure = said_B1V.softmax(-1).amax(-1).flatten().tolist()
        gains = [
            choice.gain(passed, one) if choice.climbs else 0.0
            for choice, one in zip(self.choices, sure, strict=True)
        ]
        assert isinstance(self._model, LayeredModel)
        pays = sum(gains) >= self._group.price.per_forward / self._model.num_layers
        return [
            choice.climbs and choice.decide(pays and gain > 0)
            for choice, gain in zip(self.choices, gains, strict=True)
        ]

    def _pass(self, tokens: HiddenStates, layer: int) -> HiddenStates:
        """Through one layer; they are the last ones that were fed."""
        assert isinstance(self._model, LayeredModel)
        self.forwards += 1 / self._model.num_layers
        starts_B = integers(
            [start + self._fed - tokens.count for start in self._start], self._group.device
        )
        upto = max(self._start) + self._fed
        return self._model.run_layer(self._group.slots, tokens, starts_B, upto, layer)
