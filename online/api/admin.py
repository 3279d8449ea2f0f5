"""The admin endpoints: what is active, since when, by whom and why; and the calls that change it, all audited."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from celery import Celery
from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from redis import RedisError

from online.api.schemas import Text
from online.artifacts import ArtifactStore
from online.buffer import SignalBuffer
from online.canaries import CanaryLedger, Outcome
from online.connections import CYCLE_TASK
from online.cycles import CycleLedger
from online.errors import Unavailable
from online.messages import EngineClient, Loaded
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.settings import Settings
from online.tables import Base, Canary, Route
from online.versions import is_generic

Json = dict[str, Any]
Limit = Annotated[int, Query(ge=1, le=1000)]


class Reason(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    reason: Text = Field(
        min_length=1, max_length=2000, description="kept with the change, for whoever asks later"
    )


class ActivateBody(Reason):
    version: int


@dataclass(frozen=True)
class Admin:
    settings: Settings
    engine: EngineClient
    registry: Registry
    ledger: CycleLedger
    canaries: CanaryLedger
    buffer: SignalBuffer
    artifacts: ArtifactStore
    celery: Celery
    clusters: PromptClusters | None

    def route(self, route: Route) -> Json:
        """What should serve the route, what does, and what is on its way."""
        loaded = self.engine.status().loaded.get(route.name)
        active = self.registry.active(route.name)
        unfinished = self.ledger.unfinished(route.name)
        canary = self.canaries.running().get(route.name)
        return {
            **row(route),
            "closed": route.name in self.settings.closed_routes,
            "active_version": active.id if active else None,
            "loaded_version": loaded.version if loaded else None,
            "load_error": loaded.error if loaded else "",
            "unfinished_cycle": row(unfinished) if unfinished else None,
            "canary": {**row(canary), "seen": self._seen(canary, loaded)} if canary else None,
            "cluster_of": self.settings.default_route
            if route.name in self.settings.cluster_routes
            else None,
            "cluster_requests": self.clusters.size(route.name) if self.clusters else None,
            "generic": active is not None and is_generic(active),
            "buffer": self._buffer(route.name),
        }

    def _seen(self, canary: Canary, loaded: Loaded | None) -> Json | None:
        """Both arms as this decoder has seen them; None until it drafts with the canary."""
        seen = loaded.canary if loaded else None
        return asdict(seen) if seen is not None and seen.canary.version == canary.version else None

    def end_canary(self, route: str, outcome: Outcome, actor: str, reason: str) -> Json:
        canary = self.canaries.require(route)
        if outcome == "promoted":
            self.artifacts.verify(self.registry.version(canary.version).sha256)
        ended = self.canaries.finish(canary, outcome, actor, reason, even_frozen=True)
        self.engine.nudge()
        return {"canary": row(ended)}

    def _buffer(self, route: str) -> Json:
        try:
            depth = self.buffer.depth(route)
        except RedisError as error:
            return {"error": f"the buffer does not answer: {error}"}
        return {"signals": depth.signals, "bytes": depth.bytes}

    def start_cycle(self, route: str, actor: str, reason: str) -> Json:
        cycle, created = self.ledger.request(route, actor, reason)
        if created:
            try:
                self.celery.send_task(CYCLE_TASK, args=[cycle.id])
            except Exception as error:  # kombu has no common base for what a broker can do
                # The cycle stays queued: beat's next tick sends it again.
                raise Unavailable(
                    f"cycle {cycle.id} is queued, but the trainer's queue does not answer; it starts when it does",
                    code="queue_unavailable",
                ) from error
        return {"cycle": row(cycle), "started": created}


def router(admin: Admin, authenticated: Callable[[Request], str]) -> APIRouter:
    routes = APIRouter(prefix="/admin", tags=["admin"])
    Actor = Annotated[str, Depends(authenticated)]

    @routes.get("/routes")
    def list_routes(actor: Actor) -> Json:
        """Every route: active and loaded version, buffer depth, unfinished cycle, running canary."""
        status = admin.engine.status()
        return {
            "routes": [admin.route(route) for route in admin.registry.routes()],
            "target_fingerprint": status.target_fingerprint,
            "healthy": status.alive,
        }

    @routes.get("/routes/{route}")
    def show_route(route: str, actor: Actor) -> Json:
        """One route."""
        return admin.route(admin.registry.route(route))

    @routes.get("/routes/{route}/versions")
    def list_versions(route: str, actor: Actor) -> Json:
        """The route's versions, newest first."""
        active = admin.registry.active(route)
        return {
            "versions": [row(version) for version in admin.registry.versions(route)],
            "active_version": active.id if active else None,
        }

    @routes.get("/versions/{version}")
    def show_version(version: int, actor: Actor) -> Json:
        """One version with its gate report."""
        return row(admin.registry.version(version))

    @routes.get("/activations")
    def list_activations(actor: Actor, route: str | None = None, limit: Limit = 100) -> Json:
        """Who made which version active, when and why; newest first."""
        return {"activations": [row(a) for a in admin.registry.activations(route, limit)]}

    @routes.get("/cycles")
    def list_cycles(actor: Actor, route: str | None = None, limit: Limit = 100) -> Json:
        """Training cycles and how they ended; newest first."""
        return {"cycles": [row(cycle) for cycle in admin.ledger.cycles(route, limit)]}

    @routes.get("/canaries")
    def list_canaries(actor: Actor, route: str | None = None, limit: Limit = 100) -> Json:
        """Candidates that were tried on a share of a route's requests, and how that ended; newest first."""
        return {"canaries": [row(canary) for canary in admin.canaries.canaries(route, limit)]}

    @routes.get("/audit")
    def list_audit(actor: Actor, limit: Limit = 100) -> Json:
        """Every change, by whom and why; newest first."""
        return {"audit": [row(entry) for entry in admin.registry.audit(limit)]}

    @routes.post("/routes/{route}/activate")
    def activate(route: str, body: ActivateBody, actor: Actor) -> Json:
        """Makes a version of the route active. Its weights are read and checked first."""
        admin.artifacts.verify(admin.registry.version(body.version).sha256)
        activation = admin.registry.activate(route, body.version, "manual", actor, body.reason)
        admin.engine.nudge()
        return {"activation": row(activation)}

    @routes.post("/routes/{route}/rollback")
    def rollback(route: str, body: Reason, actor: Actor) -> Json:
        """Goes back to the version before the active one. Needs neither Redis nor the trainer."""
        activation = admin.registry.rollback(route, "rollback", actor, body.reason)
        admin.engine.nudge()
        return {"activation": row(activation)}

    @routes.post("/routes/{route}/canary/promote")
    def promote_canary(route: str, body: Reason, actor: Actor) -> Json:
        """Makes the canary's version active now, whatever its test says. Its weights are read and checked first."""
        return admin.end_canary(route, "promoted", actor, body.reason)

    @routes.post("/routes/{route}/canary/abort")
    def abort_canary(route: str, body: Reason, actor: Actor) -> Json:
        """Gives all requests to the active version again."""
        return admin.end_canary(route, "aborted", actor, body.reason)

    @routes.post("/routes/{route}/cycles", status_code=202)
    def start_cycle(route: str, body: Reason, actor: Actor) -> Json:
        """Starts a training cycle now, or returns the one that is unfinished. Refused while a canary is running."""
        return admin.start_cycle(route, actor, body.reason)

    @routes.post("/routes/{route}/freeze")
    def freeze(route: str, body: Reason, actor: Actor) -> Json:
        """Stops automatic promotion and rollback on the route."""
        return row(admin.registry.set_frozen(route, True, actor, body.reason))

    @routes.post("/routes/{route}/unfreeze")
    def unfreeze(route: str, body: Reason, actor: Actor) -> Json:
        """Allows automatic promotion and rollback on the route again."""
        return row(admin.registry.set_frozen(route, False, actor, body.reason))

    return routes


def row(entity: Base) -> Json:
    """A table row as JSON-ready columns."""
    return {column.key: getattr(entity, column.key) for column in entity.__table__.columns}
