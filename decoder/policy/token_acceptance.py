"""What speaks for a drafted token, and how often tokens were kept that the same spoke for: what is known of the next.

N-grams' tokens have the length of the suffix that they followed, from 1 on, and the share of what followed it; a
model's have `DRAWN`, or less behind masks, and how likely it found them; at a draft's exits see `left` and `went`.
"""

Evidence = tuple[
    bool, int, int
]  # whether the sequence is greedy; what drafted; how sure of the token that was, by SHARES

SHARES = 8  # shares of one that are told apart
ANY = -1  # share
DRAWN = 0
EXITS = -100
PRIOR_GUESSES = 8.0  # after which what was counted says as much as what one would think
GUESSES = 500.0  # that a count remembers


def left(passed: int) -> int:
    """What drafted: the exit behind so many of the draft's layers."""
    return EXITS - 2 * passed


def went(passed: int) -> int:
    """A later one, for the token went on from there."""
    return EXITS - 2 * passed - 1


class KeepRates:
    """Counts by evidence. One for each kind of token that learns from another past: a route's n-grams, a draft."""

    def __init__(self) -> None:
        self._known: dict[
            Evidence, tuple[float, float]
        ] = {}  # tokens that were looked at, and those kept

    def rate(self, evidence: Evidence, otherwise: float) -> float:
        """How likely such a token is kept, where `otherwise` is what one would think."""
        looked, kept = self._known.get(evidence, (0.0, 0.0))
        return (kept + otherwise * PRIOR_GUESSES) / (looked + PRIOR_GUESSES)

    def seen(self, evidence: Evidence, kept: float) -> None:
        """For tokens of its own share, and for those of any."""
        fade = 1 - 1 / GUESSES
        for key in {evidence, (*evidence[:2], ANY)}:
            looked, before = self._known.get(key, (0.0, 0.0))
            self._known[key] = looked * fade + 1, before * fade + kept

    def forget(self) -> None:
        self._known.clear()
