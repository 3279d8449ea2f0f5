"""When to train: by the expected worth of a cycle, not by count alone.

Retraining on steady traffic gains nothing. A route whose last cycles gained
little waits for twice as many new signals each time, so its cost tends to
zero. A route that still gains much trains early. If acceptance falls below
the gate's promise for the active draft, the traffic has shifted, and the
route trains at once.

Pure but for `assess_route`, and without torch: the clock asks for every
route, every few seconds.
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

WORTH_GAIN = 0.01  # relative gain that is worth the cost of a cycle
MAX_BACKOFF = 16  # times the usual number of new signals
SHIFT_DIVISOR = 4  # of the usual number after a shift: its gain is easily proven
STEEP_DIVISOR = 2  # of the usual number after a steep gain
STEEP_GAIN = 0.1  # relative gain of a cycle, after which the next one gains, too
MIN_SIGNALS = 16  # enough to train on and to hold out
# Of the CUSUM, in standard deviations: a fall by one deviation raises it within 16 requests.
CUSUM_SLACK = 0.5
CUSUM_THRESHOLD = 8.0
MAX_OBSERVED = 400  # new signals that the detector reads
REFERENCE_REQUESTS = 50  # first signals, as the reference if no gate has measured one
MIN_DEVIATION = 0.05
PASSED_GATE = (
    "promoted",
    "canary",
    "held",
)  # final states of cycles whose candidate passed


@dataclass(frozen=True, slots=True)
class TrainingNeed:
    """Whether a route's next cycle is due."""

    due: bool
    waiting: int  # new signals, counted up to `needed`
    needed: int
    shift: str = ""  # how acceptance fell, if it did

    @property
    def reason(self) -> str:
        return self.shift or f"{self.waiting} new signals"


def assess_route(
    buffer: SignalBuffer,
    ledger: CycleLedger,
    registry: Registry,
    route: str,
    settings: Settings,
) -> TrainingNeed:
    """Whether a cycle of `route` is worth its cost now."""
    least = reduced(settings.cycle_min_signals, SHIFT_DIVISOR)
    past, version = ledger.cycles(route, limit=8), registry.active(route)
    last = max([row.created_at for row in (*past[:1], version) if row], default=now())
    usual = required_signals(past, buffer.depth(route), now() - last, settings)
    unclaimed = buffer.unclaimed(route, usual)
    waiting = len(unclaimed)
    if waiting >= usual or waiting < least:
        return TrainingNeed(waiting >= usual, waiting, usual)
    promised = version.gate.get("candidate_acceptance") if version and version.gate else None
    rates = [rate for rate in unclaimed[-MAX_OBSERVED:] if rate is not None]
    shift = acceptance_drop(rates, promised)
    return TrainingNeed(bool(shift), waiting, least if shift else usual, shift)


def required_signals(
    past: Sequence[Cycle], depth: Depth, idle: timedelta, settings: Settings
) -> int:
    """New signals that the next cycle waits for, `idle` after the last one.

    Never more than half of the buffer: signals that are deleted before a
    cycle claims them, for lack of room or by age, neither train a draft nor
    enter the kept sample.
    """
    least = reduced(settings.cycle_min_signals, SHIFT_DIVISOR)
    if idle > timedelta(seconds=settings.retention_s) / 2:
        return least
    bytes_each = depth.bytes / max(1, depth.signals)
    room = min(settings.buffer_signals, settings.buffer_bytes / max(1.0, bytes_each))
    wanted = backed_off(past, settings.cycle_min_signals)
    return min(wanted, max(least, int(room / 2)))


def backed_off(past: Sequence[Cycle], usual: int) -> int:
    """New signals that make the next cycle worth its cost. `past`: the route's, newest first."""
    # A failed cycle says nothing about its worth.
    finished = [cycle for cycle in past if cycle.state not in (*UNFINISHED, "failed")]
    # A refused candidate counts, too: another cycle may prove the gain that it seemed to have.
    gains = [relative_gain(cycle) for cycle in finished]
    if gains and gains[0] >= STEEP_GAIN and finished[0].state in PASSED_GATE:
        return reduced(usual, STEEP_DIVISOR)
    worthless = next((i for i, gain in enumerate(gains) if gain >= WORTH_GAIN), len(gains))
    return usual * min(MAX_BACKOFF, int(2**worthless))


def reduced(usual: int, divisor: int) -> int:
    return min(usual, max(MIN_SIGNALS, usual // divisor))


def relative_gain(cycle: Cycle) -> float:
    """The gain that a cycle's gate measured, as a share of the active draft's tokens per step."""
    gate = cycle.report.get("gate") or {}
    before = gate.get("active_tokens_per_step") or 0.0
    return float(gate.get("gain") or 0.0) / before if before else 0.0


def acceptance_drop(rates: Sequence[float], promised: float | None) -> str:
    """Describes a fall of acceptance rates, oldest first; empty if there is none.

    A one-sided CUSUM (Page, 1954): sums how far requests lie below the
    promised rate, less a slack, and never falls below zero. Without a
    promise the first requests are the reference.
    """
    if promised is None:
        reference, rates = rates[:REFERENCE_REQUESTS], rates[REFERENCE_REQUESTS:]
        if len(reference) < REFERENCE_REQUESTS:
            return ""
        promised = sum(reference) / len(reference)
    if len(rates) < MIN_SIGNALS:
        return ""
    mean = sum(rates) / len(rates)
    variance = sum((rate - mean) ** 2 for rate in rates) / len(rates)
    deviation = max(MIN_DEVIATION, math.sqrt(variance))
    total = 0.0
    for i, rate in enumerate(rates):
        total = max(0.0, total + (promised - rate) / deviation - CUSUM_SLACK)
        if total > CUSUM_THRESHOLD:
            recent = rates[max(0, i - MIN_SIGNALS) :]
            now_rate = sum(recent) / len(recent)
            return f"a shift: acceptance fell from {promised:.3f} to {now_rate:.3f}"
    return ""
