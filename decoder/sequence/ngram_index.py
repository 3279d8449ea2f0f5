"""Drafts tokens by looking up the last tokens in earlier text.

The sequence's own text, prompt and output, comes first. Where it has no
match, recent outputs of the route may have one (as in SuffixDecoding, arXiv
2411.04975). The acceptance rate of a guess is predicted from earlier
guesses with the same evidence.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from decoder.policy.token_acceptance import (
    Evidence,
    TokenAcceptance,
    confidence_bucket,
    ngram,
)

MAX_SUFFIX = 4  # tokens of a suffix that is looked up
ROUTE_TOKENS = 100_000  # tokens of outputs that a route keeps: 26 MB

Suffix = tuple[int, ...]
Counts = dict[int, int]  # of tokens after a suffix, the most recent last


class NgramGuess(NamedTuple):
    token: int
    evidence: Evidence
    acceptance: float  # the predicted rate


class NgramCounts:
    """Counts which token followed each suffix of up to `MAX_SUFFIX` tokens."""

    def __init__(self) -> None:
        # To save memory, a suffix that occurred once holds the token itself.
        self._following: dict[Suffix, Counts | int] = {}

    def get(self, suffix: Suffix) -> Counts | None:
        found = self._following.get(suffix)
        return {found: 1} if isinstance(found, int) else found

    def add(self, tokens: Sequence[int], first: int) -> None:
        """Counts the tokens from position `first` on, with the suffixes before them."""
        for suffix, token in _ngrams(tokens, first):
            if (counts := self.get(suffix)) is None:
                self._following[suffix] = token
            else:
                counts[token] = counts.pop(token, 0) + 1
                self._following[suffix] = counts

    def remove(self, tokens: Sequence[int], first: int) -> None:
        """Reverts an `add` with the same arguments."""
        for suffix, token in _ngrams(tokens, first):
            counts = self.get(suffix) or {}
            if counts[token] > 1:
                counts[token] -= 1
            elif len(counts) > 1:
                del counts[token]
            else:
                del self._following[suffix]


def _ngrams(tokens: Sequence[int], first: int) -> Iterator[tuple[Suffix, int]]:
    """Every suffix before a token, and that token, from position `first` on."""
    for at in range(max(first, 1), len(tokens)):
        token = tokens[at]
        longest = tuple(tokens[max(at - MAX_SUFFIX, 0) : at])
        for start in range(len(longest)):
            yield longest[start:], token


class RouteNgrams:
    """The n-grams of a route's recent outputs, and how often guesses are accepted."""

    def __init__(self) -> None:
        self.counts = NgramCounts()
        self.token_acceptance = TokenAcceptance()
        self._outputs: deque[tuple[list[int], int]] = deque()  # arguments of `add`
        self._tokens = 0

    def add_output(self, tokens: list[int], prompt_length: int) -> None:
        """Adds a finished sequence's output. Of its prompt only the end is used."""
        first = min(prompt_length, MAX_SUFFIX)
        text = tokens[prompt_length - first :]
        self.counts.add(text, first)
        self._outputs.append((text, first))
        self._tokens += len(text)
        while self._tokens > ROUTE_TOKENS and len(self._outputs) > 1:
            oldest, first = self._outputs.popleft()
            self.counts.remove(oldest, first)
            self._tokens -= len(oldest)


@dataclass
class NgramLookup:
    """The n-grams of one sequence and of its route."""

    route_ngrams: RouteNgrams
    greedy: bool

    def __post_init__(self) -> None:
        self._own = NgramCounts()
        self._indexed = 0  # tokens of the sequence that are counted

    def guess(self, tokens: list[int], drafted: list[int]) -> NgramGuess | None:
        """Guesses the token after a sequence's `tokens` and its `drafted` tokens.

        Finds the longest suffix that occurred before, in the sequence or
        else in the route. Guesses the token that followed it most often,
        and on a tie the most recent. None without a match.
        """
        if self._indexed < len(tokens):
            self._own.add(tokens, self._indexed)
            self._indexed = len(tokens)
        last = (*tokens[-MAX_SUFFIX:], *drafted)[-MAX_SUFFIX:]
        for length in range(len(last), 0, -1):
            suffix = last[-length:]
            if counts := self._own.get(suffix) or self.route_ngrams.counts.get(suffix):
                return self._most_frequent(counts, length)
        return None

    def _most_frequent(self, counts: Counts, suffix_length: int) -> NgramGuess:
        token, count = max(reversed(counts.items()), key=itemgetter(1))
        share = count / (sum(counts.values()) + 1)
        evidence = Evidence(self.greedy, ngram(suffix_length), confidence_bucket(share))
        acceptance = self.route_ngrams.token_acceptance.rate(evidence, share)
        return NgramGuess(token, evidence, acceptance)
