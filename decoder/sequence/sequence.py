"""A sequence that is being decoded, from its query to its client's text."""

import time
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from decoder.policy.acceptance import SEQUENCE_MEMORY, Acceptance
from decoder.recording.trace import Trace
from decoder.rollout.live import LiveDraft
from decoder.sequence.ngram_index import NgramLookup, RouteNgrams
from decoder.sequence.text import TextStream
from online.messages import Delta, FinishReason, Query, SpeculationStats, TokenLogprob

OnDelta = Callable[[Delta], None]


class LiveSequence:
    """The state of one sequence. Only the engine's thread changes it."""

    def __init__(
        self,
        query: Query,
        on_delta: OnDelta,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        recorded: bool,
    ):
        """
        Args:
            on_delta: receives every delta, on the engine's thread; must not block.
            eos_ids: tokens that end the text, unless the query ignores them.
            recorded: whether the sequence becomes a signal.
        """
        self.query = query
        self.on_delta = on_delta
        self.arrived_at = time.monotonic()
        self.first_token_at: float | None = None
        self.finish_reason: FinishReason | None = None
        self.rng = np.random.Generator(np.random.Philox(query.seed))

        # Tokens and KV caches.
        self.tokens = list(query.prompt_ids)  # prompt and output
        self.cached = 0  # tokens in the target's slot: never the last one
        self.draft: LiveDraft  # from admission to the end
        self.draft_cached = 0  # tokens in the draft's slot
        self.draft_version = 0  # of the draft that wrote the first of them
        self.wants_catch_up = False  # a step skipped the draft, which lags

        # Statistics for the choice of drafts.
        self.acceptance = Acceptance(SEQUENCE_MEMORY)
        self.ngram_lookup = NgramLookup(RouteNgrams(), query.temperature == 0)
        # Target probability by output token; NaN if it was drafted.
        self.emitted_p: list[float] = []

        # Output.
        self.text = TextStream(tokenizer, query.stop)
        self.stats = SpeculationStats()
        self.trace = Trace(query) if recorded else None
        eos_ids = frozenset() if query.ignore_eos else eos_ids
        self._end_ids = frozenset(query.stop_token_ids) | eos_ids

    # ── tokens and caches ──

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.query.prompt_ids) :]

    @property
    def emitted(self) -> int:
        """Number of output tokens."""
        return len(self.tokens) - len(self.query.prompt_ids)

    @property
    def waits_for_prefill(self) -> bool:
        """Whether prompt tokens are uncached, except for the last: a step feeds it."""
        return self.cached < len(self.query.prompt_ids) - 1

    @property
    def uncached(self) -> int:
        """Tokens that the target's slot lacks: 1 between steps, more during prefill."""
        return len(self.tokens) - self.cached

    @property
    def draft_uncached(self) -> int:
        """Tokens that the draft's slot lacks."""
        return len(self.tokens) - self.draft_cached

    def set_draft_cached(self, tokens: int) -> None:
        """Records that the draft's slot holds the first `tokens` tokens."""
        if self.draft_cached == 0:
            self.draft_version = self.draft.version
        self.draft_cached = tokens if self.draft.usable else 0

    @property
    def draft_limit(self) -> int:
        """The most tokens to draft: a step emits one more than it accepts."""
        return self.query.max_tokens - self.emitted - 1

    # ── output ──

    def append(self, token_ids: list[int]) -> tuple[int, str]:
        """Appends a step's tokens up to the one that ends the sequence.

        Returns the number of appended tokens and their text.
        """
        count = 0
        text = ""
        for token_id in token_ids:
            count += 1
            text += self._append_token(token_id)
            if self.finish_reason:
                text += self.text.finish()
                break
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return count, text

    def _append_token(self, token_id: int) -> str:
        self.tokens.append(token_id)
        if token_id in self._end_ids:
            self.finish_reason = "stop"
            return ""
        text = self.text.push(token_id)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif self.emitted >= self.query.max_tokens:
            self.finish_reason = "length"
        return text

    def deliver(
        self, text: str, token_ids: list[int], logprobs: tuple[TokenLogprob, ...] = ()
    ) -> None:
        """Sends the client a delta, unless it is empty. The last has the statistics."""
        reason = self.finish_reason
        if text or token_ids or reason:
            stats = self.stats if reason else None
            self._send(Delta(text, tuple(token_ids), logprobs, reason, stats))

    def end(self, reason: FinishReason) -> None:
        """Ends the sequence before its time, and tells the client."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.deliver("", [])

    def fail(self, error: str) -> None:
        """Ends the sequence with an error that the client sees."""
        self.finish_reason = "error"
        self._send(Delta("", (), (), "error", self.stats, error))

    def _send(self, delta: Delta) -> None:
        try:
            self.on_delta(delta)
        except RuntimeError:
            # The client's event loop is closed: the client is gone.
            self.finish_reason = self.finish_reason or "cancelled"
