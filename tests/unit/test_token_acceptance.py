"""What is counted of drafted tokens."""

from decoder.policy.token_acceptance import Evidence, TokenAcceptance, draft_token, ngram


def test_what_became_of_tokens_says_how_likely_the_next_ones_are_kept() -> None:
    """Apart for each kind of evidence; and what was long ago counts less."""
    known = TokenAcceptance()
    for _ in range(200):
        known.record(Evidence(True, ngram(4), 6), True)
        known.record(Evidence(False, ngram(4), 6), False)
    assert known.rate(Evidence(True, ngram(4), 6), 0.75) > 0.95
    assert known.rate(Evidence(False, ngram(4), 6), 0.75) < 0.05
    assert known.rate(Evidence(True, ngram(3), 6), 0.75) == 0.75
    for _ in range(1500):
        known.record(Evidence(True, ngram(4), 6), False)
    assert known.rate(Evidence(True, ngram(4), 6), 0.75) < 0.05


def test_tokens_of_any_share_are_counted_together() -> None:
    """Each once, whether it has a share or not."""
    known = TokenAcceptance()
    for share, kept in [(1, 0.0), (6, 1.0), (None, 1.0), (None, 0.5)]:
        known.record(Evidence(True, draft_token(), share), kept)
    assert abs(known.rate(Evidence(True, draft_token(), None), 0.0) - 2.5 / 12) < 0.002
    assert abs(known.rate(Evidence(True, draft_token(), 6), 0.0) - 1 / 9) < 0.002
    known.reset()
    assert known.rate(Evidence(True, draft_token(), None), 0.3) == 0.3
