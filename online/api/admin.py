"""What the admin endpoints do: describe a route, decide a canary, start a cycle."""

from dataclasses import asdict
from typing import Any

from redis import RedisError

from online.api.parts import ApiParts
from online.canaries import Outcome
from online.connections import CYCLE_TASK
from online.errors import Unavailable
from online.messages import Loaded
from online.tables import Base, Canary, Route
from online.versions import is_generic

Json = dict[str, Any]


def row(entity: Base) -> Json:
    """A database row as JSON-ready columns."""
    return {column.key: getattr(entity, column.key) for column in entity.__table__.columns}


def describe_route(parts: ApiParts, route: Route) -> Json:
    """What a route should serve, what it serves, and what is on its way."""
    name, settings = route.name, parts.settings
    loaded = parts.engine.status().loaded.get(name)
    active = parts.registry.active(name)
    unfinished = parts.ledger.unfinished(name)
    canary = parts.canaries.running().get(name)
    is_cluster = name in settings.cluster_routes
    return {
        **row(route),
        "closed": name in settings.closed_routes,
        "active_version": active.id if active else None,
        "loaded_version": loaded.version if loaded else None,
        "load_error": loaded.error if loaded else "",
        "unfinished_cycle": row(unfinished) if unfinished else None,
        "canary": {**row(canary), "seen": _seen(canary, loaded)} if canary else None,
        "cluster_of": settings.default_route if is_cluster else None,
        "cluster_requests": parts.clusters.size(name) if parts.clusters else None,
        "generic": active is not None and is_generic(active),
        "buffer": _buffer_depth(parts, name),
    }


def end_canary(parts: ApiParts, route: str, outcome: Outcome, actor: str, reason: str) -> Json:
    """Ends the route's canary by an operator's decision, also on a frozen route."""
    canary = parts.canaries.require(route)
    if outcome == "promoted":
        parts.artifacts.verify(parts.registry.version(canary.version).sha256)
    ended = parts.canaries.finish(canary, outcome, actor, reason, even_frozen=True)
    parts.engine.nudge()
    return {"canary": row(ended)}


def start_cycle(parts: ApiParts, route: str, actor: str, reason: str) -> Json:
    """Queues a cycle and sends it to the trainer, unless one is unfinished."""
    cycle, created = parts.ledger.request(route, actor, reason)
    if created:
        _send(parts, cycle.id)
    return {"cycle": row(cycle), "started": created}


def _send(parts: ApiParts, cycle_id: int) -> None:
    try:
        parts.celery.send_task(CYCLE_TASK, args=[cycle_id])
    except Exception as error:  # kombu's errors have no common base
        # The cycle stays queued: the next tick of beat sends it again.
        raise Unavailable(
            f"cycle {cycle_id} is queued, but the trainer's queue does not answer; "
            "the cycle starts when it does",
            code="queue_unavailable",
        ) from error


def _seen(canary: Canary, loaded: Loaded | None) -> Json | None:
    """Both arms as this decoder has seen them; None until the canary drafts."""
    seen = loaded.canary if loaded else None
    if seen is None or seen.canary.version != canary.version:
        return None
    return asdict(seen)


def _buffer_depth(parts: ApiParts, route: str) -> Json:
    try:
        return asdict(parts.buffer.depth(route))
    except RedisError as error:
        return {"error": f"the buffer does not answer: {error}"}
