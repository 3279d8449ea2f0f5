"""Acceptance rates of drafted tokens by evidence."""

import pytest

from decoder.policy.token_acceptance import (
    Evidence,
    TokenAcceptance,
    draft_token,
    exit_passed,
    exit_taken,
    ngram,
)


def test_rates_follow_the_tokens_with_the_same_evidence() -> None:
    """Greedy and sampled sequences are counted apart, and old tokens fade."""
    rates = TokenAcceptance()
    greedy = Evidence(True, ngram(4), 6)
    sampled = Evidence(False, ngram(4), 6)
    for _ in range(200):
        rates.record(greedy, True)
        rates.record(sampled, False)
    assert rates.rate(greedy, 0.75) > 0.95
    assert rates.rate(sampled, 0.75) < 0.05
    assert rates.rate(Evidence(True, ngram(3), 6), 0.75) == 0.75
    for _ in range(1500):
        rates.record(greedy, False)
    assert rates.rate(greedy, 0.75) < 0.05


def test_sources_are_counted_apart() -> None:
    """An n-gram of length 1, a token behind one mask, and an exit taken or passed at layer 1."""
    rates = TokenAcceptance()
    sources = [ngram(1), draft_token(1), exit_taken(1), exit_passed(1), draft_token()]
    for n, source in enumerate(sources):
        rates.record(Evidence(True, source, 3), n / 4)
    found = [rates.rate(Evidence(True, source, 3), 0.0) for source in sources]
    assert found == pytest.approx([n / 4 / 9 for n in range(5)])


def test_tokens_of_any_confidence_are_counted_together() -> None:
    """Each token once, whether it has a confidence or not; a reset forgets all."""
    rates = TokenAcceptance()
    any_confidence = Evidence(True, draft_token(), None)
    for confidence, accepted in [(1, 0.0), (6, 1.0), (None, 1.0), (None, 0.5)]:
        rates.record(Evidence(True, draft_token(), confidence), accepted)
    assert rates.rate(any_confidence, 0.0) == pytest.approx(2.5 / 12, abs=0.002)
    assert rates.rate(Evidence(True, draft_token(), 6), 0.0) == pytest.approx(1 / 9, abs=0.002)
    rates.reset()
    assert rates.rate(any_confidence, 0.3) == 0.3
