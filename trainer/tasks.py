"""The Celery tasks. Each opens, calls and reports; `trainer.cycle` works in its own process.

celery -A trainer.tasks worker celery -A trainer.tasks beat
"""

import logging
import os
import subprocess
import sys
from functools import cache

from online.canaries import CanaryLedger
from online.connections import CYCLE_TASK, TICK_TASK, celery_app, signal_buffer
from online.cycles import CycleLedger
from online.database import connect
from online.leases import Lease, LeaseLost
from online.processes import die_with_parent
from online.registry import Registry
from online.settings import Settings, warn_about_unknown_variables
from trainer.exit_codes import EXIT_LEASE_LOST, EXIT_REPORTED
from trainer.scheduling import assess_route

log = logging.getLogger("slipstream.tasks")
MAX_ATTEMPTS = 3  # attempts at one window before its cycle fails

settings = Settings()
warn_about_unknown_variables()
app = celery_app(settings)


@cache
def _ledger() -> CycleLedger:
    return CycleLedger(connect(settings.sql_url))


@cache
def _registry() -> Registry:
    return Registry(connect(settings.sql_url))


@cache
def _canaries() -> CanaryLedger:
    return CanaryLedger(connect(settings.sql_url))


@app.task(name=CYCLE_TASK)  # type: ignore[untyped-decorator]
def cycle(cycle_id: int) -> str:
    """Works a queued cycle, or one whose worker is silent. A second delivery finds it taken."""
    ledger = _ledger()
    if ledger.give_up(cycle_id, settings.lease_s, MAX_ATTEMPTS):
        return "failed"
    lease = ledger.take(cycle_id, settings.lease_s)
    if lease is None:
        return "taken"
    fault = _work(lease)
    if fault:
        log.error("cycle %d, attempt %d: %s", cycle_id, lease.fence, fault)
        try:
            ledger.release(lease, fault)
        except LeaseLost:
            pass  # The attempt has finished, or another worker has the cycle.
    return ledger.cycle(cycle_id).state


@app.task(name=TICK_TASK)  # type: ignore[untyped-decorator]
def tick() -> int:
    """Starts a cycle on every route where one is due, and resends unfinished ones without a worker.

    No cycle starts while a canary is on trial: its signals wait, since the
    next draft descends from whichever version wins.
    """
    buffer, ledger, sent = signal_buffer(settings), _ledger(), 0
    canaries = _canaries().running()
    for route in _registry().routes():
        buffer.trim(route.name)
        unfinished = ledger.unfinished(route.name)
        free = unfinished is None and route.name not in canaries
        if free and (need := assess_route(buffer, ledger, _registry(), route.name, settings)).due:
            unfinished, _ = ledger.request(route.name, "beat", need.reason)
            if need.shift:
                _registry().record("beat", "shift", route.name, need.shift)
        # A live attempt keeps its cycle, however often it is sent: `take` decides.
        if unfinished is not None:
            cycle.apply_async(args=[unfinished.id], expires=settings.tick_s * 3)
            sent += 1
    return sent


def _work(lease: Lease) -> str:
    """Runs the cycle in a subprocess; returns its fault, if it has one that the ledger lacks.

    So it has a real time limit, returns its memory, and leaves the worker
    responsive. It leads a session of its own, which lowers its priority
    (see `lease_keeper.lower_priority`).
    """
    numbers = {
        "--cycle": lease.cycle_id,
        "--fence": lease.fence,
        "--worker": os.getpid(),
    }
    command = [
        sys.executable,
        "-m",
        "trainer.cycle",
        *(str(part) for pair in numbers.items() for part in pair),
    ]
    try:
        done = subprocess.run(
            command,
            timeout=settings.cycle_limit_s,
            check=False,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    except subprocess.TimeoutExpired:
        return f"killed after {settings.cycle_limit_s} s"
    if done.returncode in (0, EXIT_LEASE_LOST, EXIT_REPORTED):
        return ""
    return f"the cycle's process ended with {done.returncode}"
