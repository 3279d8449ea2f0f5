"""N-gram guesses, compared with a plain search through the texts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.sequence import ngram_index
from decoder.sequence.ngram_index import MAX_SUFFIX, NgramCounts, NgramLookup, RouteNgrams

texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def following(texts: list[list[int]], suffix: list[int]) -> list[int]:
    """The tokens that follow a suffix in the texts, in order."""
    length = len(suffix)
    return [
        text[at]
        for text in texts
        for at in range(length, len(text))
        if text[at - length : at] == suffix
    ]


@given(texts, st.lists(st.integers(0, 2), max_size=4), st.lists(texts, max_size=4))
def test_guesses_the_most_frequent_follower_of_the_longest_suffix(
    text: list[int], drafted: list[int], others: list[list[int]]
) -> None:
    """Of the sequence's own text, or else of the route's; of equals the most route."""
    route = RouteNgrams()
    whole = [*text, *drafted]
    for other in others:
        route.add_output(other, 0)
    guess = NgramLookup(route, greedy=False).guess(text, drafted)
    for length in range(min(MAX_SUFFIX, len(whole)), 0, -1):
        if found := following([text], whole[-length:]) or following(others, whole[-length:]):
            counts = Counter(found)
            most = max(counts.values())
            assert guess is not None
            assert guess.token == next(token for token in reversed(found) if counts[token] == most)
            assert guess.acceptance == pytest.approx(most / (len(found) + 1))  # the prior
            return
    assert guess is None


def test_a_growing_text_gives_the_same_guesses() -> None:
    """An index that grows in pieces equals one that is built at once."""
    text = np.random.default_rng(1).integers(0, 3, 60).tolist()
    growing = NgramLookup(RouteNgrams(), greedy=True)
    for end in range(1, len(text) + 1, 3):
        fresh = NgramLookup(RouteNgrams(), greedy=True)
        assert growing.guess(text[:end], []) == fresh.guess(text[:end], [])


@given(st.lists(texts, min_size=1, max_size=6))
def test_removing_all_texts_leaves_no_counts(all_texts: list[list[int]]) -> None:
    """Memory is bounded only if nothing stays behind."""
    counts = NgramCounts()
    for text in all_texts:
        counts.add(text, 1)
    for text in all_texts:
        counts.remove(text, 1)
    assert not counts._following


def test_a_route_forgets_its_oldest_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are not learned, but their last tokens lead to outputs."""
    monkeypatch.setattr(ngram_index, "ROUTE_TOKENS", 50)
    route = RouteNgrams()
    for n in range(20):
        route.add_output([1, 2, 3, 100 + n, *range(10, 20)], 3)
    assert route.counts.get((3, 119)) == {10: 1}
    assert route.counts.get((2, 3)) == {100 + n: 1 for n in range(17, 20)}
    assert route.counts.get((1, 2)) is None
