"""What n-grams guess: against a search through the texts, and against what became of guesses."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.sequence import ngram_index
from decoder.sequence.ngram_index import MAX_SUFFIX, NgramCounts, NgramLookup, RouteNgrams

texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def following(texts: list[list[int]], suffix: list[int]) -> list[int]:
    """What stands behind a suffix in some texts, in order."""
    length = len(suffix)
    return [
        text[at]
        for text in texts
        for at in range(length, len(text))
        if text[at - length : at] == suffix
    ]


@given(texts, st.lists(st.integers(0, 2), max_size=4), st.lists(texts, max_size=4))
def test_guesses_what_followed_the_longest_suffix_most_often(
    text: list[int], drafted: list[int], others: list[list[int]]
) -> None:
    recent, whole = RouteNgrams(), [*text, *drafted]
    for other in others:
        recent.add_output(other, 0)
    guess = NgramLookup(recent, greedy=False).guess(text, drafted)
    for length in range(min(MAX_SUFFIX, len(whole)), 0, -1):
        if found := following([text], whole[-length:]) or following(others, whole[-length:]):
            counts = Counter(found)
            most = max(counts.values())
            assert guess is not None
            assert guess.token == next(token for token in reversed(found) if counts[token] == most)
            assert guess.acceptance == pytest.approx(
                most / (len(found) + 1)
            )  # nothing else is known yet
            return
    assert guess is None


def test_grows_with_its_text() -> None:
    """Read piece by piece it says what it says of the whole."""
    rng, grown = np.random.default_rng(1), NgramLookup(RouteNgrams(), greedy=True)
    text = rng.integers(0, 3, 60).tolist()
    for end in range(1, len(text) + 1, 3):
        assert grown.guess(text[:end], []) == NgramLookup(RouteNgrams(), greedy=True).guess(
            text[:end], []
        )


@given(st.lists(texts, min_size=1, max_size=6))
def test_what_is_removed_leaves_nothing(all_texts: list[list[int]]) -> None:
    followers = NgramCounts()
    for text in all_texts:
        followers.add(text, 1)
    for text in all_texts:
        followers.remove(text, 1)
    assert not followers._following


def test_a_route_forgets_its_oldest_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_index, "ROUTE_TOKENS", 50)
    recent = RouteNgrams()
    for n in range(20):
        recent.add_output([1, 2, 3, 100 + n, *range(10, 20)], 3)
    assert recent.counts.get((3, 119)) == {10: 1}
    assert recent.counts.get((2, 3)) == {100 + n: 1 for n in range(17, 20)}, (
        "prompts' ends lead to outputs"
    )
    assert recent.counts.get((1, 2)) is None, "prompts are nobody's output"
