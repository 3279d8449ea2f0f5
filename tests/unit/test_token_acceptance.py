"""What is counted of drafted tokens."""

from decoder.policy.token_acceptance import ANY, KeepRates


def test_what_became_of_tokens_says_how_likely_the_next_ones_are_kept() -> None:
    """Apart for each kind of evidence; and what was long ago counts less."""
    known = KeepRates()
    for _ in range(200):
        known.seen((True, 4, 6), True)
        known.seen((False, 4, 6), False)
    assert known.rate((True, 4, 6), 0.75) > 0.95
    assert known.rate((False, 4, 6), 0.75) < 0.05
    assert known.rate((True, 3, 6), 0.75) == 0.75
    for _ in range(1500):
        known.seen((True, 4, 6), False)
    assert known.rate((True, 4, 6), 0.75) < 0.05


def test_tokens_of_any_share_are_counted_together() -> None:
    """Each once, whether it has a share or not."""
    known = KeepRates()
    for share, kept in [(1, 0.0), (6, 1.0), (ANY, 1.0), (ANY, 0.5)]:
        known.seen((True, 0, share), kept)
    assert abs(known.rate((True, 0, ANY), 0.0) - 2.5 / 12) < 0.002
    assert abs(known.rate((True, 0, 6), 0.0) - 1 / 9) < 0.002
    known.forget()
    assert known.rate((True, 0, ANY), 0.3) == 0.3
