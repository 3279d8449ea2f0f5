"""The registry: routes, immutable versions, and the append-only history of which one is active, by whom and why."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from online.errors import Conflict, NotFound
from online.tables import Activation, Audit, Canary, Cycle, Route, Version, now, transaction

# Origin of a version that stands for another route's draft, whichever that is: its parent is of that route. While such
# a one is active on a route, the route has nothing of its own.
GENERIC = "generic draft"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a version is made of, before it has a number."""

    sha256: str
    recipe: dict[str, Any]
    window: dict[str, Any]
    gate: dict[str, Any]
    git_commit: str


class Registry:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # ── routes ──

    def ensure_routes(self, names: tuple[str, ...]) -> None:
        for name in names:
            try:
                with transaction(self._engine, writes=True) as session:
                    if session.get(Route, name) is None:
                        session.add(Route(name=name))
            except IntegrityError:
                pass  # Another process made it at the same moment.

    def routes(self) -> list[Route]:
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(select(Route).order_by(Route.name)))

    def route(self, name: str) -> Route:
        with transaction(self._engine, writes=False) as session:
            return require_route(session, name)

    def set_frozen(self, name: str, frozen: bool, actor: str, reason: str) -> Route:
        """Stops, or allows again, automatic promotion and rollback on a route."""
        with transaction(self._engine, writes=True) as session:
            route = require_route(session, name)
            route.frozen = frozen
            record(session, actor, "freeze" if frozen else "unfreeze", name, reason)
            return route

    # ── versions ──

    def version(self, version_id: int) -> Version:
        with transaction(self._engine, writes=False) as session:
            return _require_version(session, version_id)

    def versions(self, route: str) -> list[Version]:
        with transaction(self._engine, writes=False) as session:
            require_route(session, route)
            return list(
                session.scalars(
                    select(Version).where(Version.route == route).order_by(Version.id.desc())
                )
            )

    def refused(self, before: datetime) -> set[str]:
        """Digests of candidates from before then that the gate refused, and that nobody has activated all the same."""
        activated = select(Activation.to_version)
        rejected = select(Cycle.id).where(Cycle.state == "rejected")
        useless = (
            Version.cycle_id.in_(rejected)
            & Version.id.not_in(activated)
            & (Version.created_at < before)
        )
        with transaction(self._engine, writes=False) as session:
            digests = set(session.scalars(select(Version.sha256).where(useless)))
            return digests - set(
                session.scalars(select(Version.sha256).where(~useless | Version.cycle_id.is_(None)))
            )

    def register_first(
        self, route: str, candidate: Candidate, actor: str, parent_id: int | None = None
    ) -> Version:
        """The route's first draft, active at once. A route that has one keeps it."""
        try:
            with transaction(self._engine, writes=True) as session:
                require_route(session, route)
                if (newest := newest_activation(session, route)) is not None:
                    return _require_version(session, newest.to_version)
                version = add_version(
                    session, route, candidate, actor, parent_id=parent_id, cycle_id=None
                )
                add_activation(
                    session,
                    route,
                    newest,
                    version.id,
                    "initial",
                    actor,
                    "first draft of this route",
                )
                return version
        except IntegrityError:
            return self._require_active(route)

    # ── activations ──

    def active(self, route: str) -> Version | None:
        with transaction(self._engine, writes=False) as session:
            return active_version(session, route)

    def serving(self, route: str) -> Version | None:
        """What drafts for the route: its active version or, where that is generic, the one that it stands for."""
        with transaction(self._engine, writes=False) as session:
            return serving_version(session, route)

    def active_versions(self) -> dict[str, Version]:
        """The active version of every route, in one query: decoders ask this twice a second."""
        newest = select(func.max(Activation.id)).group_by(Activation.route)
        query = (
            select(Version)
            .join(Activation, Activation.to_version == Version.id)
            .where(Activation.id.in_(newest))
        )
        with transaction(self._engine, writes=False) as session:
            return {version.route: version for version in session.scalars(query)}

    def activations(self, route: str | None = None, limit: int = 100) -> list[Activation]:
        query = select(Activation).order_by(Activation.id.desc()).limit(limit)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query.where(Activation.route == route) if route else query))

    def activate(
        self, route: str, version_id: int, kind: str, actor: str, reason: str
    ) -> Activation:
        """Makes a version of `route` the active one.

        Raises:
            NotFound: no such route or version.
            Conflict: the version belongs to another route, is active already, or another change came first.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            require_route(session, route, change=True)
            if _require_version(session, version_id).route != route:
                raise Conflict(f"version {version_id} belongs to another route", param="version")
            return add_activation(
                session, route, newest_activation(session, route), version_id, kind, actor, reason
            )

    def rollback(
        self, route: str, kind: str, actor: str, reason: str, expected: int | None = None
    ) -> Activation:
        """Goes back to the version that was active before the active one came.

        Rollbacks in a row go further back each time; they do not swing between two versions.

        Raises:
            Conflict: nothing to go back to, or the active version is no longer `expected`.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            require_route(session, route, change=True)
            history = _history(session, route)
            target = rollback_target([(past.kind, past.to_version) for past in history])
            if target is None:
                raise Conflict(
                    f"route {route!r} has no earlier version to go back to",
                    code="nothing_to_roll_back",
                )
            if expected is not None and history[-1].to_version != expected:
                raise Conflict(f"version {expected} is no longer active on route {route!r}")
            return add_activation(session, route, history[-1], target, kind, actor, reason)

    # ── audit ──

    def record(self, actor: str, action: str, route: str, reason: str = "", **detail: Any) -> None:
        with transaction(self._engine, writes=True) as session:
            record(session, actor, action, route, reason, **detail)

    def audit(self, limit: int = 100) -> list[Audit]:
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(select(Audit).order_by(Audit.id.desc()).limit(limit)))

    def _require_active(self, route: str) -> Version:
        active = self.active(route)
        if active is None:
            raise NotFound(f"route {route!r} has no active version")
        return active


class raced:
    """Turns the unique key on (route, number) into a Conflict: someone else's activation came first."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, IntegrityError):
            raise Conflict("another activation came first; look at the route again") from error


# ── pieces that a larger transaction is made of ──


def require_route(session: Session, name: str, *, change: bool = False) -> Route:
    """The route. `change`: whoever else would change what drafts for it waits until this transaction has ended."""
    route = session.get(Route, name, with_for_update={"key_share": True} if change else None)
    if route is None:
        raise NotFound(f"no route named {name!r}", param="route", code="route_not_found")
    return route


def _require_version(session: Session, version_id: int) -> Version:
    # Integers beyond the column's range are simply versions that do not exist.
    version = session.get(Version, version_id) if 0 < version_id < 2**31 else None
    if version is None:
        raise NotFound(f"no version {version_id}", param="version", code="version_not_found")
    return version


def newest_activation(session: Session, route: str) -> Activation | None:
    query = (
        select(Activation)
        .where(Activation.route == route)
        .order_by(Activation.number.desc())
        .limit(1)
    )
    return session.scalars(query).one_or_none()


def active_version(session: Session, route: str) -> Version | None:
    newest = newest_activation(session, route)
    return _require_version(session, newest.to_version) if newest else None


def is_generic(version: Version) -> bool:
    return version.recipe.get("origin") == GENERIC


def serving_version(session: Session, route: str) -> Version | None:
    version = active_version(session, route)
    if version is None or version.parent_id is None or not is_generic(version):
        return version
    return active_version(session, _require_version(session, version.parent_id).route)


def add_version(
    session: Session,
    route: str,
    candidate: Candidate,
    actor: str,
    *,
    parent_id: int | None,
    cycle_id: int | None,
) -> Version:
    version = Version(
        route=route,
        parent_id=parent_id,
        cycle_id=cycle_id,
        sha256=candidate.sha256,
        recipe=candidate.recipe,
        window=candidate.window,
        gate=candidate.gate,
        git_commit=candidate.git_commit,
        created_by=actor,
    )
    session.add(version)
    session.flush()
    return version


def add_activation(
    session: Session,
    route: str,
    after: Activation | None,
    to: int,
    kind: str,
    actor: str,
    reason: str,
) -> Activation:
    """The activation that follows `after`, the newest one when the caller decided.

    Where another came in between, the unique key on (route, number) refuses this one: no decision is carried out on a
    state that it was not made for. A canary that is still running loses what it was compared with, and is superseded.
    """
    active = after.to_version if after else None
    if active == to:
        raise Conflict(f"version {to} is active already", param="version", code="already_active")
    activation = Activation(
        route=route,
        number=after.number + 1 if after else 1,
        from_version=active,
        to_version=to,
        kind=kind,
        actor=actor,
        reason=reason,
    )
    session.add(activation)
    session.flush()
    record(session, actor, f"activate:{kind}", route, reason, from_version=active, to_version=to)
    if (canary := running_canary(session, route)) is not None:
        end_canary(session, canary, "superseded", actor, f"version {to} was activated: {reason}")
    return activation


def running_canary(session: Session, route: str) -> Canary | None:
    return session.scalars(
        select(Canary).where(Canary.route == route, Canary.state == "running")
    ).one_or_none()


def end_canary(session: Session, canary: Canary, state: str, actor: str, reason: str) -> bool:
    """Ends a canary unless it has ended since it was read; then nothing is written."""
    running = update(Canary).where(Canary.id == canary.id, Canary.state == "running")
    ended = session.execute(
        running.values(state=state, actor=actor, reason=reason, finished_at=now())
    )
    if ended.rowcount != 1:  # type: ignore[attr-defined]
        return False
    record(
        session,
        actor,
        f"canary:{state}",
        canary.route,
        reason,
        canary=canary.id,
        version=canary.version,
    )
    return True


def record(
    session: Session, actor: str, action: str, route: str, reason: str = "", **detail: Any
) -> None:
    session.add(Audit(actor=actor, action=action, route=route, reason=reason, detail=detail))


def _history(session: Session, route: str) -> list[Activation]:
    return list(
        session.scalars(
            select(Activation).where(Activation.route == route).order_by(Activation.number)
        )
    )


def rollback_target(history: list[tuple[str, int]]) -> int | None:
    """The version below the active one when activations are pushed on a stack and rollbacks pop it."""
    stack: list[int] = []
    for kind, to in history:
        if kind in ("rollback", "auto_rollback") and to in stack:
            while stack[-1] != to:
                stack.pop()
        else:
            stack.append(to)
    return stack[-2] if len(stack) > 1 else None
