"""A chain from a draft that says what it thinks after each of its layers, and goes deeper where it is not sure.

Sorted Speculative Decoding (S2D, arXiv 2407.01955): the first layers of the draft, with its own head, are drafts
themselves. A token is drawn from the first exit whose likeliest token is likely enough. A layer that was left out for
some tokens is computed for all of them at once when a later one needs it; those that nobody needed are fed again, as
tokens are that the cache lacks. What is drawn from is what verification is told: exact, whatever the exits are worth.
What they learn is in `trainer/distill.py`.

Legend: B rows, N drafted tokens of a row at most, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from decoder.drafters import Group, begin, keep
from decoder.llama import Llama, Residual
from decoder.proposal import Proposal
from decoder.ragged import integers
from decoder.rows import Row
from decoder.sampling import at_least_float32, most_likely, probabilities, sample
from decoder.shapes import Scheme, chain_of

SURE = 0.6  # probability of the likeliest token from which on an exit is taken


class ExitDrafter:
    """A `Drafter` of chains. A draft whose layers can't be had one by one drafts as a whole."""

    uses_model = True

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        return chain_of(gamma, "exits")

    def propose(self, group: Group) -> Proposal:
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
        group.cells[:] = [{n: n for n in range(ladder.whole)}] * len(group.rows)
        probs_BNV = torch.cat(probs, 1) if probs else said[0][:, :0]
        return Proposal(torch.cat(tokens, 1), probs_BNV, said, integers(group.drafted, group.device))

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        keep(group, kept)


class _Ladder:
    """How deep each drafted token has come."""

    def __init__(self, group: Group) -> None:
        self._group, self._model = group, group.draft.model
        self._start = [len(row.tokens) for row in group.rows]
        self._waiting: dict[int, Residual] = {}  # tokens that have left after so many layers, one behind another
        self._fed = 0
        self.whole = 0  # tokens that have passed all layers

    def climb(self, token_B1: Tensor) -> Tensor:
        """What is drawn from behind the token, [B, 1, V]."""
        self._fed += 1
        if not isinstance(self._model, Llama):
            self.whole = self._fed
            starts_B = integers([start + self._fed - 1 for start in self._start], self._group.device)
            return self._model.forward(self._group.slots, token_B1, starts_B, max(self._start) + self._fed)
        passed, tokens = 1, self._pass(self._model.embed(token_B1), 0)
        said_B1V = self._model.say(tokens.last)
        while passed < len(self._model.layers):
            tokens = tokens.behind(self._waiting.pop(passed, None))
            sure_B11 = said_B1V.softmax(-1).amax(-1, keepdim=True) >= SURE
            if sure_B11.all():
                self._waiting[passed] = tokens
                return said_B1V
            passed, tokens = passed + 1, self._pass(tokens, passed)
            # A row leaves where it is sure, however deep the others of its batch go.
            said_B1V = torch.where(sure_B11, said_B1V, self._model.say(tokens.last))
        self.whole = self._fed
        return said_B1V

    def _pass(self, tokens: Residual, layer: int) -> Residual:
        """Through one layer; they are the last ones that were fed."""
        assert isinstance(self._model, Llama)
        starts_B = integers([start + self._fed - tokens.count for start in self._start], self._group.device)
        upto = max(self._start) + self._fed
        return self._model.through(self._group.slots, tokens, starts_B, upto, self._model.layers[layer])
