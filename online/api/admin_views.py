"""The admin endpoints that read: routes, versions, and the history of all changes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from online.api.admin import Json, describe_route, row
from online.api.auth import admin_caller
from online.api.parts import Parts

Limit = Annotated[int, Query(ge=1, le=1000, description="maximum number of entries")]
RouteName = Annotated[str | None, Query(description="only this route")]

router = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(admin_caller)])


@router.get("/routes")
def list_routes(parts: Parts) -> Json:
    """All routes: active and loaded version, buffer depth, unfinished cycle, running canary."""
    status = parts.engine.status()
    return {
        "routes": [describe_route(parts, route) for route in parts.registry.routes()],
        "target_fingerprint": status.target_fingerprint,
        "healthy": status.alive,
    }


@router.get("/routes/{route}")
def show_route(route: str, parts: Parts) -> Json:
    """One route, described as in the list of routes."""
    return describe_route(parts, parts.registry.route(route))


@router.get("/routes/{route}/versions")
def list_versions(route: str, parts: Parts) -> Json:
    """The route's versions, newest first."""
    active = parts.registry.active(route)
    return {
        "versions": [row(version) for version in parts.registry.versions(route)],
        "active_version": active.id if active else None,
    }


@router.get("/versions/{version}")
def show_version(version: int, parts: Parts) -> Json:
    """One version with its gate report."""
    return row(parts.registry.version(version))


@router.get("/activations")
def list_activations(parts: Parts, route: RouteName = None, limit: Limit = 100) -> Json:
    """Which version became active, when, by whom and why; newest first."""
    found = parts.registry.activations(route, limit)
    return {"activations": [row(activation) for activation in found]}


@router.get("/cycles")
def list_cycles(parts: Parts, route: RouteName = None, limit: Limit = 100) -> Json:
    """Training cycles and their results, newest first."""
    return {"cycles": [row(cycle) for cycle in parts.ledger.cycles(route, limit)]}


@router.get("/canaries")
def list_canaries(parts: Parts, route: RouteName = None, limit: Limit = 100) -> Json:
    """Canaries and their results, newest first."""
    return {"canaries": [row(canary) for canary in parts.canaries.canaries(route, limit)]}


@router.get("/audit")
def list_audit(parts: Parts, limit: Limit = 100) -> Json:
    """Every change, by whom and why; newest first."""
    return {"audit": [row(entry) for entry in parts.registry.audit(limit)]}
