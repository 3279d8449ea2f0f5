"""Registers a warmed-up draft as a route's version 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from migrations import upgrade
from online.artifacts import ArtifactStore
from online.connections import git_commit
from online.database import connect
from online.errors import Conflict, InvalidRequest
from online.registry import Registry
from online.settings import Settings
from online.tables import Version
from online.versions import Candidate

ACTOR = "warm-up"


def opened(settings: Settings, route: str) -> Registry:
    """The registry for a first version of `route`; creates or upgrades its database.

    Raises:
        InvalidRequest: the service has no such route.
        Conflict: the route has a version.
    """
    if route not in settings.routes:
        routes = ", ".join(settings.routes)
        raise InvalidRequest(f"route {route!r} is not among SLIPSTREAM_ROUTES ({routes})")
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.sql_url)
    registry = Registry(connect(settings.sql_url))
    registry.ensure_routes((route,))
    if (active := registry.active(route)) is not None:
        raise _taken(route, active)
    return registry


def register(
    registry: Registry,
    artifacts: ArtifactStore,
    route: str,
    write: Callable[[Path], None],
    recipe: dict[str, Any],
    gate: dict[str, Any],
) -> Version:
    """Publishes the files that `write` writes as the route's first version, active at once.

    Raises:
        Conflict: another version came first.
    """
    digest = artifacts.publish(write)
    made = Candidate(digest, {"origin": "warm-up", **recipe}, {}, gate, git_commit())
    version = registry.register_first(route, made, ACTOR)
    if version.sha256 != digest or version.created_by != ACTOR:
        raise _taken(route, version)
    return version


def _taken(route: str, version: Version) -> Conflict:
    who = f"version {version.id}, made by {version.created_by}"
    return Conflict(f"route {route!r} has {who}: a warmed-up draft can only be the first")
