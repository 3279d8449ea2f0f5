"""When to train: by what another cycle is worth, not by count alone.

Blind retraining on steady traffic buys nothing. So a route that gained little by its last cycles waits for twice as
many new signals each time, and its cost falls towards nothing. A route that still gains much goes on early. Where its
acceptance falls below what the active draft was promoted with, the traffic has shifted, and it is time at once.

Pure but for `assess_route`, and without torch: the clock asks this of every route, every few seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from online.buffer import Depth, SignalBuffer
from online.cycles import CycleLedger
from online.database import now
from online.leases import UNFINISHED
from online.registry import Registry
from online.settings import Settings
from online.tables import Cycle

WORTH_GAIN = 0.01  # gain in tokens per step, as a share, below which a cycle was not worth its cost
MAX_BACKOFF = 16  # times the usual number of new signals
SHIFT_DIVISOR = 4  # after a shift, one in so many of the usual number is enough: what is gained is easily proven
STEEP_DIVISOR = 2  # after a steep gain, one in so many
STEEP_GAIN = 0.1  # of a cycle, in tokens per step: the next one will gain, too
MIN_SIGNALS = (
    16  # but never fewer: there has to be something to learn and something to be examined on
)
CUSUM_SLACK, CUSUM_THRESHOLD = (
    0.5,
    8.0,
)  # of the CUSUM, in standard deviations: a fall of one deviation is noticed after 16 requests
MAX_OBSERVED = 400  # new signals that the detector reads, at most
REFERENCE_REQUESTS = 50  # first signals that stand for what is usual, where no gate has said it
PASSED_GATE = ("promoted", "canary", "held")  # ends of cycles whose candidate passed the gate


@dataclass(frozen=True, slots=True)
class TrainingNeed:
    """What the clock is told of a route."""

    due: bool
    waiting: int  # new signals, counted up to `needed`
    needed: int
    shift: str = ""  # how acceptance fell, where it did

    @property
    def reason(self) -> str:
        return self.shift or f"{self.waiting} new signals"


def assess_route(
    buffer: SignalBuffer, ledger: CycleLedger, registry: Registry, route: str, settings: Settings
) -> TrainingNeed:
    """Reads what it takes to say whether a cycle of `route` is worth its cost now."""
    least = shortened(settings.cycle_min_signals, SHIFT_DIVISOR)
    past, version = ledger.cycles(route, limit=8), registry.active(route)
    last = max([row.created_at for row in (*past[:1], version) if row], default=now())
    usual = required_signals(past, buffer.depth(route), now() - last, settings)
    unclaimed = buffer.unclaimed(route, usual)
    waiting = len(unclaimed)
    if waiting >= usual or waiting < least:
        return TrainingNeed(waiting >= usual, waiting, usual)
    promised = version.gate.get("candidate_acceptance") if version and version.gate else None
    shift = acceptance_drop(
        [rate for rate in unclaimed[-MAX_OBSERVED:] if rate is not None], promised
    )
    return TrainingNeed(bool(shift), waiting, least if shift else usual, shift)


def required_signals(
    past: Sequence[Cycle], depth: Depth, idle: timedelta, settings: Settings
) -> int:
    """New signals that the next cycle waits for, `idle` after the last: never for more than the buffer will hold.

    What no cycle has claimed when it is deleted, for want of room or with age, is neither learnt nor kept.
    """
    least = shortened(settings.cycle_min_signals, SHIFT_DIVISOR)
    if idle > timedelta(seconds=settings.retention_s) / 2:
        return least
    each = depth.bytes / max(1, depth.signals)
    room = min(settings.buffer_signals, settings.buffer_bytes / max(1.0, each))
    return min(backed_off(past, settings.cycle_min_signals), max(least, int(room / 2)))


def backed_off(past: Sequence[Cycle], usual: int) -> int:
    """New signals that the next cycle is worth its cost after. `past`: cycles of the route, newest first."""
    finished = [
        cycle for cycle in past if cycle.state not in (*UNFINISHED, "failed")
    ]  # a fault is no lack of worth
    # Also of a candidate that was refused for want of proof: what it seemed to gain is what another cycle may.
    gains = [relative_gain(cycle) for cycle in finished]
    if gains and gains[0] >= STEEP_GAIN and finished[0].state in PASSED_GATE:
        return shortened(usual, STEEP_DIVISOR)
    worthless = next((i for i, gained in enumerate(gains) if gained >= WORTH_GAIN), len(gains))
    return usual * min(MAX_BACKOFF, int(2**worthless))


def shortened(usual: int, share: int) -> int:
    return min(usual, max(MIN_SIGNALS, usual // share))


def relative_gain(cycle: Cycle) -> float:
    """What a cycle's gate measured, as a share of the active draft's tokens per step."""
    gate = cycle.report.get("gate") or {}
    before = gate.get("active_tokens_per_step") or 0.0
    return float(gate.get("gain") or 0.0) / before if before else 0.0


def acceptance_drop(acceptances: Sequence[float], promised: float | None) -> str:
    """How acceptance fell, oldest request first; empty where it did not.

    A one-sided CUSUM (Page, 1954): the sum of how far requests lie below what is usual, less a slack, never below zero.
    """
    if promised is None:
        usual, seen = acceptances[:REFERENCE_REQUESTS], acceptances[REFERENCE_REQUESTS:]
        if len(usual) < REFERENCE_REQUESTS:
            return ""
        promised = sum(usual) / len(usual)
    else:
        seen = acceptances
    if len(seen) < MIN_SIGNALS:
        return ""
    mean = sum(seen) / len(seen)
    deviation = max(0.05, math.sqrt(sum((rate - mean) ** 2 for rate in seen) / len(seen)))
    total = 0.0
    for i, rate in enumerate(seen):
        total = max(0.0, total + (promised - rate) / deviation - CUSUM_SLACK)
        if total > CUSUM_THRESHOLD:
            recent = seen[max(0, i - MIN_SIGNALS) :]
            return (
                f"a shift: acceptance fell from {promised:.3f} to {sum(recent) / len(recent):.3f}"
            )
    return ""
