"""The ledger of canaries: candidates that draft for a share of a route's requests until live acceptance decides.

One runs on a route at a time. Whoever ends it first has ended it: a decoder's test, an operator, or an activation that
takes away the version it was compared with (see `online.registry.add_activation`).
"""

from typing import Literal

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from online.errors import Conflict, NotFound
from online.registry import (
    add_activation,
    end_canary,
    newest_activation,
    raced,
    record,
    require_route,
    running_canary,
)
from online.tables import Canary, transaction

Outcome = Literal["promoted", "aborted"]


class CanaryLedger:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def running(self) -> dict[str, Canary]:
        """The running canary of every route that has one, in one query: decoders ask this twice a second."""
        query = select(Canary).where(Canary.state == "running")
        with transaction(self._engine, writes=False) as session:
            return {canary.route: canary for canary in session.scalars(query)}

    def require(self, route: str) -> Canary:
        """The route's running canary.

        Raises:
            NotFound: there is no such route, or no canary on it.
        """
        with transaction(self._engine, writes=False) as session:
            require_route(session, route)
            canary = running_canary(session, route)
            if canary is None:
                raise NotFound(f"no canary is running on route {route!r}", code="no_canary")
            return canary

    def canaries(self, route: str | None = None, limit: int = 100) -> list[Canary]:
        query = select(Canary).order_by(Canary.id.desc()).limit(limit)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query.where(Canary.route == route) if route else query))

    def counts(self) -> dict[tuple[str, str], int]:
        """(route, state) → canaries."""
        query = select(Canary.route, Canary.state, func.count()).group_by(
            Canary.route, Canary.state
        )
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
        """Ends a canary, and activates its version if it is promoted, in one transaction. Returns it as it ended.

        Raises:
            Conflict: it had ended already, or the route is frozen (code `route_frozen`).
        """
        with raced(), transaction(self._engine, writes=True) as session:
            route = require_route(session, canary.route, change=True)
            if route.frozen and not even_frozen:
                raise Conflict(f"route {route.name!r} is frozen", code="route_frozen")
            if not end_canary(session, canary, outcome, actor, reason):
                raise Conflict(f"canary {canary.id} has ended already", code="canary_ended")
            if outcome == "promoted":
                newest = newest_activation(session, route.name)
                add_activation(
                    session, route.name, newest, canary.version, "promotion", actor, reason
                )
            return session.get_one(Canary, canary.id)


def open_canary(
    session: Session, route: str, version: int, beside: int, share: float, actor: str, reason: str
) -> None:
    """Puts a version on trial. The caller has seen that none is running; the table insists."""
    about = {"version": version, "beside_version": beside, "share": share}
    session.add(Canary(route=route, state="running", actor=actor, reason=reason, **about))
    record(session, actor, "canary:start", route, reason, **about)
