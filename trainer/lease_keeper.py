"""A cycle's process: it keeps its lease, ends with its worker, and leaves serving the processor."""

import logging
import os
import threading
from pathlib import Path

from online.cycles import CycleLedger
from online.errors import SlipstreamError
from online.leases import Lease, LeaseLost
from trainer.exit_codes import EXIT_LEASE_LOST

log = logging.getLogger("slipstream.trainer")

NICENESS, SESSION_NICENESS = 10, 4
MAX_INTERVAL_S = 1.0


class LeaseKeeper:
    """Renews the lease while the cycle works; notices its loss, or the end of the worker."""

    def __init__(self, ledger: CycleLedger, lease: Lease, lease_s: float, worker: int) -> None:
        self._ledger, self._lease, self._worker = ledger, lease, worker
        self._interval_s = min(MAX_INTERVAL_S, lease_s / 4)
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raises LeaseLost if another worker has taken the cycle over."""
        if self._lost.is_set():
            raise LeaseLost(f"cycle {self._lease.cycle_id} was taken over")

    def _renew(self) -> None:
        while not self._stop.wait(self._interval_s):
            if os.getppid() != self._worker:
                # The worker was killed. Its successor takes the cycle over.
                os._exit(EXIT_LEASE_LOST)
            try:
                self._ledger.heartbeat(self._lease)
            except LeaseLost:
                self._lost.set()
                return
            except SlipstreamError as error:
                log.warning("heartbeat: %s", error)


def lower_priority() -> None:
    """Serving comes first, also on one machine.

    Linux divides the processor between sessions first, and applies niceness
    only inside one. This process leads a session of its own, so the session
    becomes nice too. Only mildly: the scheduler starves a session of very
    low weight on its core.
    """
    os.nice(NICENESS)
    try:
        Path("/proc/self/autogroup").write_text(str(SESSION_NICENESS))
    except OSError:
        pass  # Another system, or ungrouped sessions: niceness alone applies.
