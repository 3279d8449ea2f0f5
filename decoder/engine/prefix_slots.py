"""Reuse of encoded prompts: copies between KV-cache slots where contexts share a beginning."""

from collections.abc import Sequence

from decoder.drafters.caches import DraftCaches
from decoder.models.base import LanguageModel
from decoder.sequence.prefix_cache import CachedContext, PrefixCache
from decoder.sequence.sequence import LiveSequence


class PrefixSlots:
    """Copies contexts between slots of the target's and the drafts' caches.

    Works on the batch's own list of sequences: sequence i lies in slot i.
    """

    def __init__(
        self,
        seqs: Sequence[LiveSequence],
        target: LanguageModel,
        draft_caches: DraftCaches,
        kept_slots: range,
    ) -> None:
        """`kept_slots` are for contexts of finished sequences."""
        self._seqs, self._target, self._draft_caches = seqs, target, draft_caches
        self._cache = PrefixCache(kept_slots)

    def live_contexts(self) -> list[CachedContext]:
        return [self._context(slot) for slot in range(len(self._seqs))]

    def reuse(self, seq: LiveSequence, slot: int, live: Sequence[CachedContext]) -> None:
        """Copies the longest beginning that a context shares to a new sequence's slot."""
        draft = seq.draft
        found = self._cache.find(seq.query.route, seq.tokens[:-1], draft.version, live)
        if found is None:
            return
        context, seq.cached = found
        # Keys of another draft version would cost acceptance for as long as the prefix is popular.
        if context.draft_version == draft.version:
            seq.draft_cached = min(context.draft_cached, seq.cached)
            seq.draft_version = draft.version
        self.copy(seq, context.slot, slot)
        if not draft.usable:  # it may have failed in the copy
            seq.draft_cached = 0

    def store(self, slot: int) -> None:
        """Keeps a finished sequence's context, if it is worth a slot."""
        kept_slot = self._cache.store(self._context(slot))
        if kept_slot is not None:
            self.copy(self._seqs[slot], slot, kept_slot)

    def copy(self, seq: LiveSequence, source: int, destination: int) -> None:
        """Copies what is cached of a sequence's context, the target's part and the draft's."""
        if seq.cached:
            self._target.copy(source, destination, seq.cached)
        self._draft_caches.copy(seq, source, destination)

    def clear(self) -> None:
        self._cache.clear()

    def _context(self, slot: int) -> CachedContext:
        seq = self._seqs[slot]
        draft_cached = min(seq.draft_cached, seq.cached)
        tokens = seq.tokens[: seq.cached]
        return CachedContext(slot, seq.query.route, tokens, draft_cached, seq.draft_version)
