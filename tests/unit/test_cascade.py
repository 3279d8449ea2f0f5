"""Chains in fewer forwards: n-grams guess, and what is drafted is what an ordinary chain would have been."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoder.drafters import cascade, model
from decoder.ragged import integers, ragged
from decoder.sampling import Sampling
from decoder.shapes import chain
from decoder.suffixes import Suffixes
from tests.tabular import TableModel

V = 4
CONTEXTS = [[1, 2, 3], [0, 1], [2, 2, 2, 2]]
CACHED, DRAFTED = [1, 1, 0], [4, 2, 3]


@pytest.mark.parametrize("temperatures", [[0.0] * 3, [1.0] * 3, [0.0, 0.7, 1.3]], ids=["greedy", "sampled", "both"])
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_cascade_drafts_what_the_chain_drafts(temperatures: list[float], seed: int, guessed: int) -> None:
    """Whatever is guessed: the same tokens from the same distributions, and the cache holds the chain."""
    rng = np.random.default_rng(guessed)
    uniform_BN = torch.from_numpy(np.random.default_rng(seed).random((3, 4)))
    sampling = Sampling.of(temperatures, [0, 3, 0], [1.0, 1.0, 0.8], V)
    rows, drafted_B = slice(0, 3), integers(DRAFTED, "cpu")
    fed = [context[start:] for context, start in zip(CONTEXTS, CACHED, strict=True)]
    starts_B, longest = integers(CACHED, "cpu"), max(map(len, CONTEXTS))
    unseen_BT, unseen_B = ragged(fed, "cpu"), integers(list(map(len, fed)), "cpu")
    shaped = drafted_B, chain(4), sampling, uniform_BN
    expected = model.propose(primed(), rows, unseen_BT, unseen_B, starts_B, longest, *shaped)

    def guess(row: int, drafted: list[int], count: int) -> list[int]:
        return rng.integers(0, V, rng.integers(0, count + 1)).tolist()  # type: ignore[no-any-return]

    table = primed()
    found, chains, held = cascade.propose(table, rows, CONTEXTS, CACHED, DRAFTED, sampling, uniform_BN, guess)
    for b, count in enumerate(DRAFTED):
        assert found.tokens_BN[b, :count].tolist() == expected.tokens_BN[b, :count].tolist() == chains[b]
        for ours, theirs in (
            (found.probs_BQV, expected.probs_BQV),
            (torch.cat(found.logits_BQV, 1), torch.cat(expected.logits_BQV, 1)),
        ):
            assert torch.equal(ours[b, :count], theirs[b, :count])
        whole = [*CONTEXTS[b], *found.tokens_BN[b, :count].tolist()]
        assert len(CONTEXTS[b]) <= held[b] < len(whole)
        assert table.context(b)[: held[b]] == whole[: held[b]]


def primed() -> TableModel:
    table = TableModel(V, 3, 3)
    for b, (context, start) in enumerate(zip(CONTEXTS, CACHED, strict=True)):
        if start:
            table.encode([b], torch.tensor([context[:start]]), torch.tensor([0]), start)
    return table


def test_right_guesses_save_forwards() -> None:
    """All tokens of a chain from one forward, where the guess is what is drawn."""
    calls = []

    class Counted(TableModel):
        def forward(self, *args: object) -> torch.Tensor:  # type: ignore[override]
            calls.append(args)
            return super().forward(*args)  # type: ignore[arg-type]

    greedy = Sampling.of([0.0], [0], [1.0], V)
    uniform_BN = torch.zeros(1, 4, dtype=torch.float64)
    alone, _, _ = cascade.propose(Counted(V, 3), [0], [[1, 2]], [0], [4], greedy, uniform_BN, lambda *_: [])
    assert len(calls) == 4
    right = alone.tokens_BN[0].tolist()
    found, _, _ = cascade.propose(
        Counted(V, 3), [0], [[1, 2]], [0], [4], greedy, uniform_BN, lambda _, done, count: right[len(done) :][:count]
    )
    assert (len(calls), found.tokens_BN[0].tolist()) == (5, right)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(0, 2), max_size=4), st.integers(1, 6))
def test_suffixes_continue_what_stood_there_last(text: list[int], drafted: list[int], count: int) -> None:
    """The longest suffix of up to four tokens that occurred in the text before, where it did last: against a search."""
    found = Suffixes().continuation(text, drafted, count)
    whole = [*text, *drafted]
    for length in range(min(4, len(whole) - 1), 0, -1):
        places = [at for at in range(length, len(text)) if text[at - length : at] == whole[-length:]]
        if places:
            assert found == rounds(whole, places[-1], count)
            return
    assert found == []


def rounds(text: Sequence[int], at: int, count: int) -> list[int]:
    """What stands there, and where the text ends, again from there."""
    following = list(text[at:])
    return (following * (count + 1))[:count]


def test_suffixes_grow_with_their_text() -> None:
    """Read piece by piece they say what they say of the whole."""
    rng, grown = np.random.default_rng(1), Suffixes()
    text = rng.integers(0, 3, 60).tolist()
    for end in range(1, len(text) + 1, 3):
        assert grown.continuation(text[:end], [], 5) == Suffixes().continuation(text[:end], [], 5)
