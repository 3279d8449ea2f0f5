"""Keeps a failing draft away from clients: its sequences decode plainly."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.drafting")
R = TypeVar("R")


class DraftFaults:
    """Contains what fails in a draft. `seqs` is the batch's own list of sequences."""

    def __init__(self, seqs: Sequence[LiveSequence], metrics: ServiceMetrics) -> None:
        self._seqs, self._metrics = seqs, metrics

    def contain(self, draft: LiveDraft, work: Callable[[], R]) -> R | None:
        """Runs `work`. If it raises, the draft is out of use until weights are installed."""
        try:
            return work()
        except Exception:
            draft.fail()
            for seq in self._seqs:
                if seq.draft is draft:
                    seq.draft_cached = 0
            self._metrics.faults.labels("draft").inc()
            log.exception(
                "version %d of route %s failed; its sequences go on without it",
                draft.version,
                draft.route,
            )
            return None
