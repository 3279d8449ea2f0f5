"""The drafts' KV caches: filled when a sequence's draft lags, copied when a sequence moves.

Sequence i of the batch lies in slot i of every draft's cache.
"""

from collections.abc import Sequence
from functools import partial

import torch

from decoder.drafters.faults import DraftFaults
from decoder.models.ragged import encode, fit
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence

PREFILL_RATIO = 4  # prompt tokens of a draft that cost about as much as one of the target


class DraftCaches:
    """Works on the batch's own list of sequences."""

    def __init__(
        self,
        seqs: Sequence[LiveSequence],
        faults: DraftFaults,
        prefill_tokens: int,
        device: torch.device | str,
    ) -> None:
        self._seqs, self._faults, self._device = seqs, faults, device
        self.budget = PREFILL_RATIO * prefill_tokens  # tokens that one catch-up may encode

    def copy(self, seq: LiveSequence, source: int, destination: int) -> None:
        """Copies the cached context of the sequence's draft to another slot."""
        draft, cached = seq.draft, seq.draft_cached
        if draft.usable and cached:
            self._faults.contain(draft, partial(draft.model.copy, source, destination, cached))

    def catch_up(self, members: Sequence[int]) -> None:
        """Encodes what drafts lack of their sequences' contexts.

        Sequences that exceed the budget are left to the next steps.
        """
        by_draft: dict[LiveDraft, list[int]] = {}
        for i in members:
            by_draft.setdefault(self._seqs[i].draft, []).append(i)
        for draft, group in by_draft.items():
            if draft.usable:
                self._encode(draft, group)

    def _encode(self, draft: LiveDraft, members: list[int]) -> None:
        seqs = [self._seqs[i] for i in members]
        pieces = fit([seq.tokens[seq.draft_cached : -1] for seq in seqs], self.budget)
        seqs, members = seqs[: len(pieces)], members[: len(pieces)]
        starts = [seq.draft_cached for seq in seqs]
        self._faults.contain(
            draft, partial(encode, draft.model, members, pieces, starts, self._device)
        )
        for seq, start, piece in zip(seqs, starts, pieces, strict=True):
            seq.set_draft_cached(start + len(piece))
