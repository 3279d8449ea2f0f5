"""Canaries: candidates that draft for a share of a route's requests until live acceptance decides.

A route has at most one running canary. Whoever ends it first decides its outcome: the test in a
decoder, an operator, or an activation that replaces the version it was compared with.
"""

from typing import Literal

from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session

from online.activations import add_activation, newest_activation, raced, require_route
from online.audit import record
from online.database import now, transaction
from online.errors import Conflict, NotFound
from online.tables import Activation, Canary

Outcome = Literal["promoted", "aborted"]


class CanaryLedger:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def running(self) -> dict[str, Canary]:
        """The running canary of every route that has one.

        One query: decoders call this twice a second.
        """
        query = select(Canary).where(Canary.state == "running")
        with transaction(self._engine, writes=False) as session:
            return {canary.route: canary for canary in session.scalars(query)}

    def require(self, route: str) -> Canary:
        """The route's running canary.

        Raises:
            NotFound: there is no such route, or it has no running canary.
        """
        with transaction(self._engine, writes=False) as session:
            require_route(session, route)
            canary = running_canary(session, route)
            if canary is None:
                raise NotFound(f"no canary is running on route {route!r}", code="no_canary")
            return canary

    def canaries(self, route: str | None = None, limit: int = 100) -> list[Canary]:
        """Canaries of one route or of all routes, newest first."""
        query = select(Canary).order_by(Canary.id.desc()).limit(limit)
        if route:
            query = query.where(Canary.route == route)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query))

    def counts(self) -> dict[tuple[str, str], int]:
        """Number of canaries by (route, state)."""
        group = (Canary.route, Canary.state)
        query = select(*group, func.count()).group_by(*group)
        with transaction(self._engine, writes=False) as session:
            return {(route, state): count for route, state, count in session.execute(query)}

    def finish(
        self,
        canary: Canary,
        outcome: Outcome,
        actor: str,
        reason: str,
        *,
        even_frozen: bool = False,
    ) -> Canary:
        """Ends a canary. If it is promoted, activates its version in the same transaction.

        Raises:
            Conflict: it has ended already, or the route is frozen (code `route_frozen`).
        """
        with raced(), transaction(self._engine, writes=True) as session:
            route = require_route(session, canary.route, change=True)
            if route.frozen and not even_frozen:
                raise Conflict(f"route {route.name!r} is frozen", code="route_frozen")
            if not end_canary(session, canary, outcome, actor, reason):
                raise Conflict(f"canary {canary.id} has ended already", code="canary_ended")
            if outcome == "promoted":
                newest = newest_activation(session, route.name)
                version = canary.version
                add_activation(session, route.name, newest, version, "promotion", actor, reason)
            return session.get_one(Canary, canary.id)


def open_canary(
    session: Session, route: str, version: int, beside: int, share: float, actor: str, reason: str
) -> None:
    """Starts a canary. The caller has checked that none runs; a unique index enforces it."""
    about = {"version": version, "beside_version": beside, "share": share}
    session.add(Canary(route=route, state="running", actor=actor, reason=reason, **about))
    record(session, actor, "canary:start", route, reason, **about)


def running_canary(session: Session, route: str) -> Canary | None:
    query = select(Canary).where(Canary.route == route, Canary.state == "running")
    return session.scalars(query).one_or_none()


def end_canary(session: Session, canary: Canary, state: str, actor: str, reason: str) -> bool:
    """Ends a canary. Writes nothing and returns False if it has ended since it was read."""
    running = update(Canary).where(Canary.id == canary.id, Canary.state == "running")
    ended = session.execute(
        running.values(state=state, actor=actor, reason=reason, finished_at=now())
    )
    if ended.rowcount != 1:  # type: ignore[attr-defined]
        return False
    about = {"canary": canary.id, "version": canary.version}
    record(session, actor, f"canary:{state}", canary.route, reason, **about)
    return True


def supersede_canary(session: Session, activation: Activation) -> None:
    """Ends the route's running canary: the activation replaced the version beside it."""
    canary = running_canary(session, activation.route)
    if canary is None:
        return
    reason = f"version {activation.to_version} was activated: {activation.reason}"
    end_canary(session, canary, "superseded", activation.actor, reason)
