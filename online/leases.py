"""Leases on training cycles inside a transaction: one worker at a time writes to a cycle.

Each lease has a fence. A later lease on the same cycle has a higher fence and voids earlier ones,
so a worker that was silent for too long can no longer write.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from online.database import now
from online.errors import Conflict, NotFound
from online.tables import MAX_ID, Cycle

UNFINISHED = ("queued", "running")


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to work on a cycle."""

    cycle_id: int
    fence: int


class LeaseLost(Conflict):
    """Another worker has taken the cycle over: stop, write nothing."""

    code = "lease_lost"


def require_cycle(session: Session, cycle_id: int) -> Cycle:
    """The cycle with this id.

    Raises:
        NotFound: there is none.
    """
    cycle = session.get(Cycle, cycle_id) if 0 < cycle_id <= MAX_ID else None
    if cycle is None:
        raise NotFound(f"no cycle {cycle_id}", param="cycle")
    return cycle


def unfinished_cycle(session: Session, route: str) -> Cycle | None:
    query = select(Cycle).where(Cycle.route == route, Cycle.state.in_(UNFINISHED))
    return session.scalars(query).one_or_none()


def is_free(cycle: Cycle, lease_s: float) -> bool:
    """Whether the cycle is queued, or its worker has been silent for `lease_s`."""
    silent = now() - cycle.heartbeat_at > timedelta(seconds=lease_s)
    return cycle.state == "queued" or (cycle.state == "running" and silent)


def change_free_cycle(session: Session, cycle: Cycle, **values: Any) -> bool:
    """Changes an unfinished cycle. Returns False if its fence moved since it was read."""
    same = update(Cycle).where(
        Cycle.id == cycle.id, Cycle.fence == cycle.fence, Cycle.state.in_(UNFINISHED)
    )
    return bool(session.execute(same.values(**values)).rowcount == 1)  # type: ignore[attr-defined]


def change_leased_cycle(session: Session, lease: Lease, **values: Any) -> None:
    """Changes the cycle of a lease.

    Raises:
        LeaseLost: the lease no longer holds.
    """
    held = update(Cycle).where(
        Cycle.id == lease.cycle_id, Cycle.fence == lease.fence, Cycle.state == "running"
    )
    if session.execute(held.values(**values)).rowcount != 1:  # type: ignore[attr-defined]
        raise LeaseLost(f"cycle {lease.cycle_id} is no longer held with fence {lease.fence}")


def close_cycle(
    session: Session, lease: Lease, state: str, report: dict[str, Any], error: str = ""
) -> Cycle:
    """Ends the cycle of a lease.

    Raises:
        LeaseLost: the lease no longer holds.
    """
    ended = {"state": state, "report": report, "error": error, "finished_at": now()}
    change_leased_cycle(session, lease, **ended)
    cycle = require_cycle(session, lease.cycle_id)
    session.refresh(cycle)
    return cycle
