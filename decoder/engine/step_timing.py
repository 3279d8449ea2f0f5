"""Measures what steps cost when the engine starts: the choice of γ begins with these times."""

import logging
import time
from collections.abc import Callable

from decoder.engine.batch import Batch
from decoder.policy.draft_cost import DraftCostModel
from decoder.sequence.sequence import LiveSequence
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.batch")

WARM_UP_STEPS = 2  # they allocate
TIMED_STEPS = 6

MakeSequences = Callable[[int, int], list[LiveSequence]]  # how many, and the γ of each


def measure_step_times(batch: Batch, make_sequences: MakeSequences) -> None:
    """Times whole steps for each batch size, and forgets everything else about them.

    Call it while the batch is empty.
    """
    controller, metrics = batch.controller, batch.metrics
    batch.metrics = ServiceMetrics("rehearsal")
    try:
        for count in controller.step_times.batch_sizes:
            seconds = {
                gamma: _fastest_step(batch, make_sequences(count, gamma))
                for gamma in {0, 1, controller.max_gamma}
            }
            controller.step_times.calibrate(count, seconds)
    except Exception:
        # A model that can't run fails again at its first request, which then reports it.
        log.exception("steps could not be timed")
    finally:
        batch.clear()
        batch.metrics = metrics
        controller.probe_budget_s = 0.0
        controller.draft_cost_model = DraftCostModel()
        for draft in batch.drafts.values():
            draft.acceptance.reset()


def _fastest_step(batch: Batch, seqs: list[LiveSequence]) -> float:
    """The fastest of a few steps, in seconds. What slows the others down is the machine."""
    batch.join(seqs)
    taken = []
    for _ in range(WARM_UP_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        batch.step()
        taken.append(time.perf_counter() - started)
    batch.clear()
    return min(taken[WARM_UP_STEPS:])
