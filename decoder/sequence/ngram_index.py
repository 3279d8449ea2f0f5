"""Drafting from texts: what followed the last tokens where they stood before, and how sure that makes of a guess.

A sequence's own text, prompt and output, says most; what it does not know, the outputs that its route has answered with of
late may (as in SuffixDecoding, arXiv 2411.04975). How often guesses are kept that the same speaks for is counted: that
is what is known of the next ones.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from decoder.policy.token_acceptance import Evidence, TokenAcceptance, confidence_bucket, ngram

LONGEST = 4  # tokens of a suffix that are looked up
RECENT_TOKENS = 100_000  # of outputs that a route remembers: 26 MB

Counts = dict[int, int]  # of tokens; the latest is the last


class NgramGuess(NamedTuple):
    token: int
    evidence: Evidence
    acceptance: float


class NgramCounts:
    """What followed every few tokens of texts, and how often."""

    def __init__(self) -> None:
        self._after: dict[
            tuple[int, ...], Counts | int
        ] = {}  # most have had one follower, once: that one alone

    def get(self, suffix: tuple[int, ...]) -> Counts | None:
        found = self._after.get(suffix)
        return {found: 1} if isinstance(found, int) else found

    def add(self, tokens: Sequence[int], first: int) -> None:
        """A text's tokens from there on, each as what follows the ones before it."""
        for at in range(max(first, 1), len(tokens)):
            for length in range(1, min(LONGEST, at) + 1):
                suffix, token = tuple(tokens[at - length : at]), tokens[at]
                if (counts := self.get(suffix)) is None:
                    self._after[suffix] = token
                else:
                    counts[token] = counts.pop(token, 0) + 1
                    self._after[suffix] = counts

    def remove(self, tokens: Sequence[int], first: int) -> None:
        """What was added."""
        for at in range(max(first, 1), len(tokens)):
            for length in range(1, min(LONGEST, at) + 1):
                suffix, token = tuple(tokens[at - length : at]), tokens[at]
                counts = self.get(suffix) or {}
                if counts[token] > 1:
                    counts[token] -= 1
                elif len(counts) > 1:
                    del counts[token]
                else:
                    del self._after[suffix]


class RouteNgrams:
    """What a route's last outputs say, and how often its sequences' guesses were kept."""

    def __init__(self) -> None:
        self.counts = NgramCounts()
        self.token_acceptance = TokenAcceptance()
        self._outputs: deque[tuple[list[int], int]] = deque()
        self._tokens = 0

    def add_output(self, tokens: list[int], prompt: int) -> None:
        """A text of which so many tokens are the prompt has come to its end."""
        first = min(prompt, LONGEST)
        text = tokens[prompt - first :]
        self.counts.add(text, first)
        self._outputs.append((text, first))
        self._tokens += len(text)
        while self._tokens > RECENT_TOKENS and len(self._outputs) > 1:
            oldest, first = self._outputs.popleft()
            self.counts.remove(oldest, first)
            self._tokens -= len(oldest)


@dataclass
class NgramLookup:
    """A sequence's. Grows with its text."""

    route_ngrams: RouteNgrams
    greedy: bool

    def __post_init__(self) -> None:
        self._own = NgramCounts()
        self._read = 0  # tokens before here are in

    def guess(self, tokens: list[int], drafted: list[int]) -> NgramGuess | None:
        """The token that has followed most often, of equals the latest, where the longest suffix of a text and of what
        was drafted behind it stood before: in the text itself or else in another. None: it has stood nowhere."""
        if self._read < len(tokens):
            self._own.add(tokens, self._read)
            self._read = len(tokens)
        last = (*tokens[-LONGEST:], *drafted)[-LONGEST:]
        for length in range(len(last), 0, -1):
            suffix = last[-length:]
            if counts := self._own.get(suffix) or self.route_ngrams.counts.get(suffix):
                token, count = max(reversed(counts.items()), key=itemgetter(1))
                share = count / (sum(counts.values()) + 1)
                evidence = Evidence(self.greedy, ngram(length), confidence_bucket(share))
                return NgramGuess(
                    token, evidence, self.route_ngrams.token_acceptance.rate(evidence, share)
                )
        return None
