"""Acceptance rates of drafted tokens, by the evidence before verification.

A token's evidence says whether its sequence is greedy, what drafted it, and
how confident that was. The acceptance rate of earlier tokens with the same
evidence predicts the acceptance of the next.
"""

from enum import IntEnum
from functools import cache
from typing import NamedTuple

CONFIDENCE_BUCKETS = 8
PRIOR_TOKENS = 8.0  # counted tokens that weigh as much as the caller's prior
MEMORY_TOKENS = 500.0
DECAY = 1 - 1 / MEMORY_TOKENS


class SourceKind(IntEnum):
    """What drafts a token."""

    NGRAM = 0
    DRAFT = 1
    EXIT = 2  # the draft's head after some of its layers
    PASSED_EXIT = 3  # a layer beyond an exit


class Source(NamedTuple):
    """What drafted a token. The functions below define `detail` for each kind."""

    kind: SourceKind
    detail: int


@cache
def ngram(suffix_length: int) -> Source:
    """An n-gram that matched a suffix of this many tokens."""
    return Source(SourceKind.NGRAM, suffix_length)


@cache
def draft_token(masks: int = 0) -> Source:
    """The draft model, behind this many mask tokens of its own input."""
    return Source(SourceKind.DRAFT, masks)


@cache
def exit_taken(layers: int) -> Source:
    """The draft's exit after its first `layers` layers."""
    return Source(SourceKind.EXIT, layers)


@cache
def exit_passed(layers: int) -> Source:
    """A layer of the draft beyond the exit after its first `layers` layers."""
    return Source(SourceKind.PASSED_EXIT, layers)


class Evidence(NamedTuple):
    """What is known of a drafted token before it is verified."""

    greedy: bool
    source: Source
    confidence: int | None  # see `confidence_bucket`; None: any


def confidence_bucket(probability: float) -> int:
    """The bucket of a probability that the drafter gives its token."""
    return int(CONFIDENCE_BUCKETS * probability)


class TokenAcceptance:
    """Acceptance rates by evidence, of one route's n-grams or of one draft."""

    def __init__(self) -> None:
        # By evidence: tokens verified, tokens accepted. Both decay.
        self._counts: dict[Evidence, tuple[float, float]] = {}

    def rate(self, evidence: Evidence, prior: float) -> float:
        """The acceptance rate of such tokens; `prior` is the rate without counts."""
        verified, accepted = self._counts.get(evidence, (0.0, 0.0))
        return (accepted + prior * PRIOR_TOKENS) / (verified + PRIOR_TOKENS)

    def record(self, evidence: Evidence, accepted: float) -> None:
        """Counts a verified token, under its own confidence and under any confidence.

        `accepted` is 0 or 1, or the probability of acceptance where only
        that is known.
        """
        self._count(evidence, accepted)
        if evidence.confidence is not None:
            self._count(Evidence(evidence.greedy, evidence.source, None), accepted)

    def _count(self, evidence: Evidence, accepted: float) -> None:
        verified, before = self._counts.get(evidence, (0.0, 0.0))
        self._counts[evidence] = verified * DECAY + 1, before * DECAY + accepted

    def reset(self) -> None:
        self._counts.clear()
