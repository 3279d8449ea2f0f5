"""The registry: routes, immutable versions, and which version is active, since when and why."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError

from online.activations import (
    activation_history,
    active_version,
    add_activation,
    newest_activation,
    raced,
    require_route,
    rollback_target,
    serving_version,
)
from online.audit import record
from online.canaries import supersede_canary
from online.database import transaction
from online.drafters import Teaching
from online.errors import Conflict, NotFound
from online.tables import Activation, Audit, Cycle, Route, Version
from online.versions import Candidate, add_version, require_version


class Registry:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # ── routes ──

    def ensure_routes(self, names: tuple[str, ...]) -> None:
        """Creates those routes that do not exist yet."""
        for name in names:
            try:
                with transaction(self._engine, writes=True) as session:
                    if session.get(Route, name) is None:
                        session.add(Route(name=name))
            except IntegrityError:
                pass  # Another process created it at the same moment.

    def routes(self) -> list[Route]:
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(select(Route).order_by(Route.name)))

    def route(self, name: str) -> Route:
        with transaction(self._engine, writes=False) as session:
            return require_route(session, name)

    def set_frozen(self, name: str, frozen: bool, actor: str, reason: str) -> Route:
        """Stops or allows automatic promotion and rollback on a route."""
        with transaction(self._engine, writes=True) as session:
            route = require_route(session, name)
            route.frozen = frozen
            record(session, actor, "freeze" if frozen else "unfreeze", name, reason)
            return route

    def set_teaching(self, teaching: Mapping[str, Teaching]) -> None:
        """Stores by route what its drafts must learn. Creates routes that do not exist yet."""
        self.ensure_routes(tuple(teaching))
        with transaction(self._engine, writes=True) as session:
            for name, fields in teaching.items():
                require_route(session, name).teaching = dict(fields)

    # ── versions ──

    def version(self, version_id: int) -> Version:
        with transaction(self._engine, writes=False) as session:
            return require_version(session, version_id)

    def versions(self, route: str) -> list[Version]:
        """The route's versions, newest first."""
        query = select(Version).where(Version.route == route).order_by(Version.id.desc())
        with transaction(self._engine, writes=False) as session:
            require_route(session, route)
            return list(session.scalars(query))

    def refused(self, before: datetime) -> set[str]:
        """Digests of candidates that the gate refused before then and that were never activated.

        A digest that another version needs is left out.
        """
        activated = select(Activation.to_version)
        rejected = select(Cycle.id).where(Cycle.state == "rejected")
        useless = (
            Version.cycle_id.in_(rejected)
            & Version.id.not_in(activated)
            & (Version.created_at < before)
        )
        needed = ~useless | Version.cycle_id.is_(None)
        with transaction(self._engine, writes=False) as session:
            digests = set(session.scalars(select(Version.sha256).where(useless)))
            return digests - set(session.scalars(select(Version.sha256).where(needed)))

    def register_first(
        self, route: str, candidate: Candidate, actor: str, parent_id: int | None = None
    ) -> Version:
        """Registers and activates the route's first draft. A route that has a draft keeps it."""
        try:
            with transaction(self._engine, writes=True) as session:
                require_route(session, route)
                if (active := active_version(session, route)) is not None:
                    return active
                version = add_version(
                    session, route, candidate, actor, parent_id=parent_id, cycle_id=None
                )
                reason = "first draft of this route"
                add_activation(session, route, None, version.id, "initial", actor, reason)
                return version
        except IntegrityError:
            return self._require_active(route)

    # ── activations ──

    def active(self, route: str) -> Version | None:
        with transaction(self._engine, writes=False) as session:
            return active_version(session, route)

    def serving(self, route: str) -> Version | None:
        """The version that drafts for the route (see `serving_version`)."""
        with transaction(self._engine, writes=False) as session:
            return serving_version(session, route)

    def active_versions(self) -> dict[str, Version]:
        """The active version of every route. One query: decoders call this twice a second."""
        newest = select(func.max(Activation.id)).group_by(Activation.route)
        query = (
            select(Version)
            .join(Activation, Activation.to_version == Version.id)
            .where(Activation.id.in_(newest))
        )
        with transaction(self._engine, writes=False) as session:
            return {version.route: version for version in session.scalars(query)}

    def activations(self, route: str | None = None, limit: int = 100) -> list[Activation]:
        """Activations of one route or of all routes, newest first."""
        query = select(Activation).order_by(Activation.id.desc()).limit(limit)
        if route:
            query = query.where(Activation.route == route)
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(query))

    def activate(
        self, route: str, version_id: int, kind: str, actor: str, reason: str
    ) -> Activation:
        """Activates a version of the route. A running canary is superseded.

        Raises:
            NotFound: no such route or version.
            Conflict: the version belongs to another route or is active already, or another
                activation came first.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            require_route(session, route, change=True)
            if require_version(session, version_id).route != route:
                raise Conflict(f"version {version_id} belongs to another route", param="version")
            newest = newest_activation(session, route)
            made = add_activation(session, route, newest, version_id, kind, actor, reason)
            supersede_canary(session, made)
            return made

    def rollback(
        self, route: str, kind: str, actor: str, reason: str, expected: int | None = None
    ) -> Activation:
        """Activates the version that was active before the present one.

        Each further rollback goes one version further back. A running canary is superseded.

        Raises:
            Conflict: there is no earlier version, or `expected` is no longer active.
        """
        with raced(), transaction(self._engine, writes=True) as session:
            require_route(session, route, change=True)
            history = activation_history(session, route)
            target = rollback_target((past.kind, past.to_version) for past in history)
            if target is None:
                message = f"route {route!r} has no earlier version to go back to"
                raise Conflict(message, code="nothing_to_roll_back")
            if expected is not None and history[-1].to_version != expected:
                raise Conflict(f"version {expected} is no longer active on route {route!r}")
            made = add_activation(session, route, history[-1], target, kind, actor, reason)
            supersede_canary(session, made)
            return made

    # ── audit ──

    def record(self, actor: str, action: str, route: str, reason: str = "", **detail: Any) -> None:
        with transaction(self._engine, writes=True) as session:
            record(session, actor, action, route, reason, **detail)

    def audit(self, limit: int = 100) -> list[Audit]:
        """Audit rows, newest first."""
        with transaction(self._engine, writes=False) as session:
            return list(session.scalars(select(Audit).order_by(Audit.id.desc()).limit(limit)))

    def _require_active(self, route: str) -> Version:
        active = self.active(route)
        if active is None:
            raise NotFound(f"route {route!r} has no active version")
        return active
