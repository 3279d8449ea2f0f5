"""The ledger of training cycles: single flight per route, leases, fencing, and the watermark of used signals.

SQL is the truth. Redis may deliver a task twice or forget an acknowledgement; the ledger makes either harmless.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from online.activations import (
    add_activation,
    newest_activation,
    raced,
    require_route,
    serving_version,
)
from online.audit import record
from online.buffer import id_order
from online.canaries import open_canary, running_canary
from online.errors import Conflict, NotFound
from online.tables import MAX_ID, Cycle, Version, now, transaction
from online.versions import Candidate, add_version

UNFINISHED = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a cycle. A later lease on the same cycle has a higher fence and voids this one."""

    cycle_id: int
    fence: int


class LeaseLost(Conflict):
    """Another worker has taken the cycle over: stop, write nothing."""

    code = "lease_lost"


class CycleLedger:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def request(self, route: str, actor: str, reason: str = "") -> tuple[Cycle, bool]:
        """A queued cycle of the route, and whether it is new: one that is unfinished is returned instead.

        Raises:
            Conflict: the last cycle's candidate is still on trial. What is learnt now could not be promoted over it.
        """
        try:
            with transaction(self._engine, writes=True) as session:
                require_route(session, route)
                if (cycle := _unfinished(session, route)) is not None:
                    return cycle, False
                if (canary := running_canary(session, route)) is not None:
                    raise Conflict(
                        f"version {canary.version} is a canary on route {route!r}; the next cycle waits for its end",
                        code="canary_running",
                    )
                cycle = Cycle(route=route, state="queued", actor=actor)
                session.add(cycle)
                session.flush()
                record(session, actor, "cycle:request", route, reason, cycle=cycle.id)
                return cycle, True
        except IntegrityError:
            cycle_now = self.unfinished(route)
            if cycle_now is None:
                raise
            return cycle_now, False

    def unfinished(self, route: str) -> Cycle | None:
        with transaction(self._engine, writes=False) as session:
            return _unfinished(session, route)

    def take(self, cycle_id: int, lease_s: float) -> Lease | None:
        """A lease on a cycle that nobody works on (see `_free`), else None."""
        with transaction(self._engine, writes=True) as session:
            cycle = _require(session, cycle_id)
            lease = Lease(cycle_id, cycle.fence + 1)
            taken = _free(cycle, lease_s) and _replace(
                session,
                cycle,
                state="running",
                fence=lease.fence,
                attempts=cycle.attempts + 1,
                heartbeat_at=now(),
            )
            return lease if taken else None

    def heartbeat(self, lease: Lease) -> None:
        self._update(lease, heartbeat_at=now())

    def set_window(self, lease: Lease, first: str, last: str) -> None:
        self._update(lease, window_first=first, window_last=last)

    def watermark(self, route: str) -> str | None:
        """The newest entry id that a finished cycle has used. What is not newer must not be used again."""
        query = select(Cycle.window_last).where(
            Cycle.route == route, Cycle.state.not_in(UNFINISHED), Cycle.window_last.is_not(None)
        )
        with transaction(self._engine, writes=False) as session:
            return max(
                (last for last in session.scalars(query) if last), key=id_order, default=None
            )

    def finish(self, lease: Lease, state: str, report: dict[str, Any], error: str = "") -> Cycle:
        """Ends a cycle that makes no version: nothing to learn from, or given up."""
        with transaction(self._engine, writes=True) as session:
            return _close(session, lease, state, report, error)

    def give_up(self, cycle_id: int, lease_s: float, attempts: int) -> bool:
        """Fails a cycle that has had its `attempts` and that nobody works on.

        Its window counts as used: a poisonous one must not loop.
        """
        with transaction(self._engine, writes=True) as session:
            cycle = _require(session, cycle_id)
            if cycle.attempts < attempts or not _free(cycle, lease_s):
                return False
            error = f"given up after {cycle.attempts} attempts; the last one: {cycle.error or 'ended unseen'}"
            if not _replace(
                session,
                cycle,
                state="failed",
                error=error,
                fence=cycle.fence + 1,
                finished_at=now(),
            ):
                return False
            record(session, "trainer", "cycle:failed", cycle.route, error, cycle=cycle_id)
            return True

    def release(self, lease: Lease, error: str) -> None:
        """Puts a cycle whose attempt failed back into the queue."""
        self._update(lease, state="queued", error=error, heartbeat_at=now())

    def conclude(
        self,
        lease: Lease,
        parent: Version,
        candidate: Candidate,
        promote: bool,
        report: dict[str, Any],
        canary_share: float = 0.0,
    ) -> Cycle:
        """Registers the candidate and promotes it, or not, in one transaction with the end of its cycle.

        With a `canary_share` it first drafts for that share of the route's requests. It is held back when the route is
        frozen, when another canary is running, or when the active version is no longer the one that it was compared
        with.

        Raises:
            LeaseLost: another worker has the cycle.
            Conflict: another activation came at the same moment; nothing was written.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            cycle = _close(session, lease, "rejected", report, "")
            route = require_route(session, cycle.route, change=True)
            newest = newest_activation(session, cycle.route)
            version = add_version(
                session,
                cycle.route,
                candidate,
                "trainer",
                parent_id=parent.id,
                cycle_id=lease.cycle_id,
            )
            if promote and route.frozen:
                cycle.state, cycle.error = "held", "the route is frozen"
            elif promote and (
                (serving := serving_version(session, cycle.route)) is None
                or serving.id != parent.id
            ):
                cycle.state, cycle.error = "held", f"the active version is no longer {parent.id}"
            elif promote and (canary := running_canary(session, cycle.route)) is not None:
                cycle.state, cycle.error = (
                    "held",
                    f"version {canary.version} is a canary on this route",
                )
            elif promote and canary_share:
                cycle.state = "canary"
                reason = candidate.gate["reason"]
                open_canary(
                    session, cycle.route, version.id, parent.id, canary_share, "trainer", reason
                )
            elif promote:
                cycle.state = "promoted"
                reason = candidate.gate["reason"]
                add_activation(
                    session, cycle.route, newest, version.id, "promotion", "trainer", reason
                )
            cycle.report = {**report, "version": version.id}
            return cycle

    def cycle(self, cycle_id: int) -> Cycle:
        with transaction(self._engine, writes=False) as session:
            return _require(session, cycle_id)

    def cycles(self, route: str | None = None, limit: int = 100) -> list[Cycle]:
        query = select(Cycle).order_by(Cycle.id.desc()).limit(limit)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query.where(Cycle.route == route) if route else query))

    def counts(self) -> dict[tuple[str, str], int]:
        """(route, state) → cycles."""
        query = select(Cycle.route, Cycle.state, func.count()).group_by(Cycle.route, Cycle.state)
        with transaction(self._engine, writes=False) as session:
            return {(route, state): count for route, state, count in session.execute(query)}

    def _update(self, lease: Lease, **values: Any) -> None:
        with transaction(self._engine, writes=True) as session:
            _guarded(session, lease, **values)


def _free(cycle: Cycle, lease_s: float) -> bool:
    """Queued, or running under a worker that has been silent for `lease_s`."""
    silent = now() - cycle.heartbeat_at > timedelta(seconds=lease_s)
    return cycle.state == "queued" or (cycle.state == "running" and silent)


def _replace(session: Session, cycle: Cycle, **values: Any) -> bool:
    """Changes an unfinished cycle unless its fence moved since it was read."""
    same = update(Cycle).where(
        Cycle.id == cycle.id, Cycle.fence == cycle.fence, Cycle.state.in_(UNFINISHED)
    )
    return bool(session.execute(same.values(**values)).rowcount == 1)  # type: ignore[attr-defined]


def _guarded(session: Session, lease: Lease, **values: Any) -> None:
    held = update(Cycle).where(
        Cycle.id == lease.cycle_id, Cycle.fence == lease.fence, Cycle.state == "running"
    )
    if session.execute(held.values(**values)).rowcount != 1:  # type: ignore[attr-defined]
        raise LeaseLost(f"cycle {lease.cycle_id} is no longer held with fence {lease.fence}")


def _close(session: Session, lease: Lease, state: str, report: dict[str, Any], error: str) -> Cycle:
    _guarded(session, lease, state=state, report=report, error=error, finished_at=now())
    cycle = _require(session, lease.cycle_id)
    session.refresh(cycle)
    return cycle


def _unfinished(session: Session, route: str) -> Cycle | None:
    return session.scalars(
        select(Cycle).where(Cycle.route == route, Cycle.state.in_(UNFINISHED))
    ).one_or_none()


def _require(session: Session, cycle_id: int) -> Cycle:
    cycle = session.get(Cycle, cycle_id) if 0 < cycle_id <= MAX_ID else None
    if cycle is None:
        raise NotFound(f"no cycle {cycle_id}", param="cycle")
    return cycle
