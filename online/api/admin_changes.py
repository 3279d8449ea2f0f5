"""The admin endpoints that change something. Each change is audited with its author and reason."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from online.api.admin import Json, end_canary, row
from online.api.admin import start_cycle as start
from online.api.auth import Actor
from online.api.parts import Parts
from online.api.schemas import Text

router = APIRouter(prefix="/admin/routes/{route}", tags=["admin"])


class Reason(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    reason: Text = Field(
        min_length=1, max_length=2000, description="stored with the change, for the audit"
    )


class ActivateBody(Reason):
    version: int


@router.post("/activate")
def activate(route: str, body: ActivateBody, actor: Actor, parts: Parts) -> Json:
    """Activates a version of the route. Its weights are read and checked first."""
    parts.artifacts.verify(parts.registry.version(body.version).sha256)
    made = parts.registry.activate(route, body.version, "manual", actor, body.reason)
    parts.engine.nudge()
    return {"activation": row(made)}


@router.post("/rollback")
def rollback(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Goes back to the version before the active one. Needs neither Redis nor the trainer."""
    made = parts.registry.rollback(route, "rollback", actor, body.reason)
    parts.engine.nudge()
    return {"activation": row(made)}


@router.post("/canary/promote")
def promote_canary(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Activates the canary's version now, without its test. Checks its weights first."""
    return end_canary(parts, route, "promoted", actor, body.reason)


@router.post("/canary/abort")
def abort_canary(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Ends the canary. The active version drafts for all requests again."""
    return end_canary(parts, route, "aborted", actor, body.reason)


@router.post("/cycles", status_code=202)
def start_cycle(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Starts a training cycle, or returns the unfinished one. Refused while a canary runs."""
    return start(parts, route, actor, body.reason)


@router.post("/freeze")
def freeze(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Stops automatic promotion and rollback on the route."""
    return row(parts.registry.set_frozen(route, True, actor, body.reason))


@router.post("/unfreeze")
def unfreeze(route: str, body: Reason, actor: Actor, parts: Parts) -> Json:
    """Allows automatic promotion and rollback on the route again."""
    return row(parts.registry.set_frozen(route, False, actor, body.reason))
