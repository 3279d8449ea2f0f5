"""The ledger of training cycles: one unfinished cycle per route, leases, and used signals.

SQL holds the truth. If Redis delivers a task twice or forgets an acknowledgement, the ledger
makes that harmless.
"""

from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from online.activations import raced, require_route
from online.audit import record
from online.buffer import id_order
from online.canaries import running_canary
from online.database import now, transaction
from online.errors import Conflict
from online.leases import (
    UNFINISHED,
    Lease,
    change_free_cycle,
    change_leased_cycle,
    close_cycle,
    is_free,
    require_cycle,
    unfinished_cycle,
)
from online.promotion import roll_out
from online.tables import Cycle, Version
from online.versions import Candidate, add_version


class CycleLedger:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # ── reading ──

    def cycle(self, cycle_id: int) -> Cycle:
        with transaction(self._engine, writes=False) as session:
            return require_cycle(session, cycle_id)

    def cycles(self, route: str | None = None, limit: int = 100) -> list[Cycle]:
        """Cycles of one route or of all routes, newest first."""
        query = select(Cycle).order_by(Cycle.id.desc()).limit(limit)
        if route:
            query = query.where(Cycle.route == route)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query))

    def unfinished(self, route: str) -> Cycle | None:
        with transaction(self._engine, writes=False) as session:
            return unfinished_cycle(session, route)

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of cycles by (route, state)."""
        group = (Cycle.route, Cycle.state)
        query = select(*group, func.count()).group_by(*group)
        with transaction(self._engine, writes=False) as session:
            return {(route, state): count for route, state, count in session.execute(query)}

    def watermark(self, route: str) -> str | None:
        """The newest entry id that a finished cycle has used.

        No later cycle may use this entry or an older one.
        """
        query = select(Cycle.window_last).where(
            Cycle.route == route, Cycle.state.not_in(UNFINISHED), Cycle.window_last.is_not(None)
        )
        with transaction(self._engine, writes=False) as session:
            used = [last for last in session.scalars(query) if last]
        return max(used, key=id_order, default=None)

    # ── starting ──

    def request(self, route: str, actor: str, reason: str = "") -> tuple[Cycle, bool]:
        """Queues a cycle of the route. Returns it and True, or the unfinished one and False.

        Raises:
            Conflict: a canary is running on the route. What a cycle learns now could not be
                promoted over it.
        """
        try:
            with transaction(self._engine, writes=True) as session:
                require_route(session, route)
                if (cycle := unfinished_cycle(session, route)) is not None:
                    return cycle, False
                return _queue_cycle(session, route, actor, reason), True
        except IntegrityError:
            cycle_now = self.unfinished(route)
            if cycle_now is None:
                raise
            return cycle_now, False

    def take(self, cycle_id: int, lease_s: float) -> Lease | None:
        """A lease on the cycle, or None if another worker holds it (see `is_free`)."""
        with transaction(self._engine, writes=True) as session:
            cycle = require_cycle(session, cycle_id)
            if not is_free(cycle, lease_s):
                return None
            lease = Lease(cycle_id, cycle.fence + 1)
            taken = change_free_cycle(
                session,
                cycle,
                state="running",
                fence=lease.fence,
                attempts=cycle.attempts + 1,
                heartbeat_at=now(),
            )
            return lease if taken else None

    # ── working ──

    def heartbeat(self, lease: Lease) -> None:
        self._change(lease, heartbeat_at=now())

    def set_window(self, lease: Lease, first: str, last: str) -> None:
        """Records the first and last entry id that the cycle uses."""
        self._change(lease, window_first=first, window_last=last)

    # ── ending ──

    def release(self, lease: Lease, error: str) -> None:
        """Queues a cycle again whose attempt failed."""
        self._change(lease, state="queued", error=error, heartbeat_at=now())

    def give_up(self, cycle_id: int, lease_s: float, attempts: int) -> bool:
        """Fails a cycle that nobody works on after `attempts` attempts. Returns whether it did.

        Its window counts as used, so that a window that always fails is not tried again.
        """
        with transaction(self._engine, writes=True) as session:
            cycle = require_cycle(session, cycle_id)
            if cycle.attempts < attempts or not is_free(cycle, lease_s):
                return False
            last = cycle.error or "ended unseen"
            error = f"given up after {cycle.attempts} attempts; the last one: {last}"
            ended = {"state": "failed", "error": error, "finished_at": now()}
            if not change_free_cycle(session, cycle, fence=cycle.fence + 1, **ended):
                return False
            record(session, "trainer", "cycle:failed", cycle.route, error, cycle=cycle_id)
            return True

    def finish(self, lease: Lease, state: str, report: dict[str, Any], error: str = "") -> Cycle:
        """Ends a cycle that makes no version."""
        with transaction(self._engine, writes=True) as session:
            return close_cycle(session, lease, state, report, error)

    def conclude(
        self,
        lease: Lease,
        parent: Version,
        candidate: Candidate,
        promote: bool,
        report: dict[str, Any],
        canary_share: float = 0.0,
    ) -> Cycle:
        """Ends a cycle with a candidate: registers it and rolls it out if it passed the gate.

        `canary_share`: share of requests that it drafts for first; 0: it is active at once.

        Raises:
            LeaseLost: another worker has the cycle.
            Conflict: another activation came at the same moment; nothing was written.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            cycle = close_cycle(session, lease, "rejected", report)
            route = require_route(session, cycle.route, change=True)
            version = add_version(
                session, route.name, candidate, "trainer", parent_id=parent.id, cycle_id=cycle.id
            )
            cycle.report = {**report, "version": version.id}
            if promote:
                roll_out(session, cycle, route, version, parent, canary_share)
            return cycle

    def _change(self, lease: Lease, **values: Any) -> None:
        with transaction(self._engine, writes=True) as session:
            change_leased_cycle(session, lease, **values)


def _queue_cycle(session: Session, route: str, actor: str, reason: str) -> Cycle:
    if (canary := running_canary(session, route)) is not None:
        raise Conflict(
            f"version {canary.version} is a canary on route {route!r}; "
            "the next cycle waits for its end",
            code="canary_running",
        )
    cycle = Cycle(route=route, state="queued", actor=actor)
    session.add(cycle)
    session.flush()
    record(session, actor, "cycle:request", route, reason, cycle=cycle.id)
    return cycle
