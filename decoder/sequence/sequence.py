"""A sequence: one sequence that is being decoded, and how a step's verdict turns into text for its client."""

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
    def __init__(
        self,
        query: Query,
        on_delta: OnDelta,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        recorded: bool,
    ):
        self.query = query
        self.on_delta = on_delta
        self.tokens = list(query.prompt_ids)  # prompt and output; the last one is in no cache yet
        self.cached = 0  # tokens whose keys and values the target's slot holds
        self.draft: LiveDraft  # which drafts for it, from admission to its end
        self.draft_cached = 0  # the same in the draft's
        self.draft_version = 0  # which began to write them
        self.wants_catch_up = (
            False  # a step did without it that would have asked it, had it been up with the context
        )
        self.acceptance = Acceptance(SEQUENCE_MEMORY)
        self.emitted_p: list[
            float
        ] = []  # of each output token: its probability, where it was the target's own draw
        self.rng = np.random.Generator(np.random.Philox(query.seed))
        self.ngram_lookup = NgramLookup(
            RouteNgrams(), query.temperature == 0
        )  # its route's, from admission on
        self.text = TextStream(tokenizer, query.stop)
        self.stats = SpeculationStats()
        self.trace = Trace(query) if recorded else None
        self.finish_reason: FinishReason | None = None
        self._end_ids = frozenset(query.stop_token_ids) | (
            frozenset() if query.ignore_eos else eos_ids
        )
        self.arrived_at = time.monotonic()
        self.first_token_at: float | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.query.prompt_ids) :]

    @property
    def emitted(self) -> int:
        return len(self.tokens) - len(self.query.prompt_ids)

    @property
    def waits_for_prefill(self) -> bool:
        """Whether prompt tokens are missing; the last one is the first step's input, like any step's."""
        return self.cached < len(self.query.prompt_ids) - 1

    @property
    def uncached(self) -> int:
        """Tokens that the target's slot lacks. One is the rule: the last token, which is in no cache."""
        return len(self.tokens) - self.cached

    @property
    def draft_uncached(self) -> int:
        """The same of the draft's slot."""
        return len(self.tokens) - self.draft_cached

    def set_draft_cached(self, tokens: int) -> None:
        """The draft's slot holds so many tokens of the context."""
        if self.draft_cached == 0:
            self.draft_version = self.draft.version
        self.draft_cached = tokens if self.draft.usable else 0

    @property
    def draft_limit(self) -> int:
        """Tokens that may be drafted: the last one comes from the target anyway."""
        return self.query.max_tokens - self.emitted - 1

    def append(self, token_ids: list[int]) -> tuple[int, str]:
        """Takes a step's tokens until one of them ends the sequence. Returns how many were taken, and the text they make."""
        pieces = []
        taken = 0
        for token_id in token_ids:
            taken += 1
            self.tokens.append(token_id)
            if token_id in self._end_ids:
                self.finish_reason = "stop"
            else:
                pieces.append(self.text.push(token_id))
                if self.text.stopped:
                    self.finish_reason = "stop"
                elif self.emitted >= self.query.max_tokens:
                    self.finish_reason = "length"
            if self.finish_reason:
                pieces.append(self.text.finish())
                break
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        return taken, "".join(pieces)

    def deliver(
        self, text: str, token_ids: list[int], logprobs: tuple[TokenLogprob, ...] = ()
    ) -> None:
        """Hands the client its next piece; nothing a client's side does may reach the engine."""
        reason = self.finish_reason
        if text or token_ids or reason:
            self._send(
                Delta(text, tuple(token_ids), logprobs, reason, self.stats if reason else None)
            )

    def end(self, reason: FinishReason) -> None:
        """Ends the sequence from outside, and tells its client."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.deliver("", [])

    def fail(self, error: str) -> None:
        self.finish_reason = "error"
        self._send(Delta("", (), (), "error", self.stats, error))

    def _send(self, delta: Delta) -> None:
        try:
            self.on_delta(delta)
        except RuntimeError:
            # The client's event loop is gone, and the client with it.
            self.finish_reason = self.finish_reason or "cancelled"
