"""Runs a draft token by token, through all of its layers or as many as pay.

Legend: B sequences, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from decoder.drafters.base import DraftGroup
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


class TokenwiseDraft(Protocol):
    """A draft at work behind a group's contexts."""

    complete: int  # tokens, the first ones, that have passed all layers
    forwards: float  # of the draft; a layer with the head counts as its share

    def next_logits(self, token_B1: Tensor) -> Tensor:
        """Feeds one more token and returns the logits behind it, [B, 1, V]."""
        ...

    @property
    def evidence(self) -> list[list[list[Evidence]]]:
        """By sequence and drafted token; the first token comes from the encoded context."""
        ...


def draft_of(group: DraftGroup) -> TokenwiseDraft:
    """The group's draft, layer by layer if its model can be run like that."""
    model = group.draft.model
    return LayeredDraft(group, model) if isinstance(model, LayeredModel) else WholeDraft(group)


class WholeDraft:
    """Every token passes all layers."""

    def __init__(self, group: DraftGroup) -> None:
        self.complete = 0
        self.forwards = 0.0
        self._group = group
        self._starts = [len(seq.tokens) for seq in group.seqs]

    def next_logits(self, token_B1: Tensor) -> Tensor:
        starts_B = integers([start + self.complete for start in self._starts], self._group.device)
        self.complete += 1
        self.forwards += 1
        upto = max(self._starts) + self.complete
        return self._group.draft.model.forward(self._group.slots, token_B1, starts_B, upto)

    @property
    def evidence(self) -> list[list[list[Evidence]]]:
        return [[[] for _ in range(self.complete + 1)] for _ in self._group.seqs]


class LayeredDraft:
    """Every token runs through layers until no sequence gains from another one."""

    def __init__(self, group: DraftGroup, model: LayeredModel) -> None:
        self.complete = 0
        self.forwards = 0.0
        self._group, self._model = group, model
        self._starts = [len(seq.tokens) for seq in group.seqs]
        self._fed = 0
        self._left: dict[int, HiddenStates] = {}  # by layers passed: tokens that left there
        self._exits = [
            ExitChoice.of(seq, count) for seq, count in zip(group.seqs, group.wanted, strict=True)
        ]

    @property
    def evidence(self) -> list[list[list[Evidence]]]:
        return [choice.evidence for choice in self._exits]

    def next_logits(self, token_B1: Tensor) -> Tensor:
        self._fed += 1
        for choice in self._exits:
            choice.start_token()
        hidden = self._run_layer(self._model.embed(token_B1), 0)
        logits_B1V = self._model.exit_logits(hidden.last)
        layers = 1
        while layers < self._model.num_layers and any(
            deeper := self._go_deeper(layers, logits_B1V)
        ):
            hidden = self._run_layer(hidden.after(self._left.pop(layers, None)), layers)
            layers += 1
            # A sequence's exit does not depend on how deep others of its batch go.
            deeper_B11 = torch.tensor(deeper, device=logits_B1V.device)[:, None, None]
            logits_B1V = torch.where(deeper_B11, self._model.exit_logits(hidden.last), logits_B1V)
        if layers < self._model.num_layers:
            self._left[layers] = hidden.after(self._left.get(layers))
        else:
            self.complete = self._fed
        return logits_B1V

    def _go_deeper(self, layers: int, logits_B1V: Tensor) -> list[bool]:
        """By sequence, whether its token runs through the next layer.

        A layer costs all sequences of the step, so their gains together have to pay for it.
        """
        confidence = logits_B1V.softmax(-1).amax(-1).flatten().tolist()
        gains = [
            choice.gain(layers, confidence[b]) if choice.deeper else 0.0
            for b, choice in enumerate(self._exits)
        ]
        pays = sum(gains) >= self._group.cost.per_forward / self._model.num_layers
        return [
            choice.deeper and choice.decide(pays and gains[b] > 0)
            for b, choice in enumerate(self._exits)
        ]

    def _run_layer(self, hidden: HiddenStates, layer: int) -> HiddenStates:
        """Runs the last tokens that were fed through one layer."""
        self.forwards += 1 / self._model.num_layers
        starts = [start + self._fed - hidden.count for start in self._starts]
        starts_B = integers(starts, self._group.device)
        upto = max(self._starts) + self._fed
        return self._model.run_layer(self._group.slots, hidden, starts_B, upto, layer)


@dataclass(slots=True)
class ExitChoice:
    """At which exit a sequence's tokens leave the draft."""

    rates: TokenAcceptance
    greedy: bool
    acceptance: float  # rate α of the draft
    limit: int  # tokens to draft
    accepted: float  # probability that all tokens before are accepted
    deeper: bool = False  # whether the token at hand still runs on
    token_acceptance: float = 0.0  # estimate for the token at hand
    evidence: list[list[Evidence]] = field(default_factory=lambda: [[]])  # by token
    _leave: tuple[Evidence, float] | None = None  # at the exit at hand, with its acceptance
    _stay: tuple[Evidence, float] | None = None

    @classmethod
    def of(cls, seq: LiveSequence, limit: int) -> "ExitChoice":
        rate = seq.acceptance.rate
        greedy = seq.query.temperature == 0
        return cls(seq.draft.token_acceptance, greedy, rate, limit, rate)

    def start_token(self) -> None:
        if len(self.evidence) > 1:
            self.accepted *= self.token_acceptance
        self.deeper = True
        self.token_acceptance = self.acceptance
        self.evidence.append([])

    def gain(self, layers: int, confidence: float) -> float:
        """Expected tokens gained by not leaving at the exit behind so many layers.

        `confidence` is the probability of the exit's most likely token.
        """
        bucket = confidence_bucket(confidence)
        leave = Evidence(self.greedy, exit_taken(layers), bucket)
        stay = Evidence(self.greedy, exit_passed(layers), bucket)
        # The prior of an exit is the whole draft's acceptance, so that exits are tried.
        self._leave = leave, self.rates.rate(leave, self.acceptance)
        self._stay = stay, self.rates.rate(stay, self.acceptance)
        # The token, and those that an accepted token is followed by.
        following = sum(self.acceptance**n for n in range(self.limit - len(self.evidence) + 1))
        return max(0.0, self._stay[1] - self._leave[1]) * self.accepted * following

    def decide(self, deeper: bool) -> bool:
        """Takes the exit of the last `gain`, or not. Returns `deeper`."""
        chosen = self._stay if deeper else self._leave
        assert chosen is not None, "`gain` comes first"
        evidence, self.token_acceptance = chosen
        self.deeper = deeper
        self.evidence[-1].append(evidence)
        return deeper
