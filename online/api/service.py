"""The endpoints about the service itself: models, health, readiness, version and metrics."""

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis import RedisError

from online.api.auth import generation_caller
from online.api.parts import ApiParts, Parts
from online.errors import NotFound, SlipstreamError

log = logging.getLogger("slipstream.api")

GATE_VERDICTS = ("promoted", "canary", "held", "rejected")  # states of cycles with a candidate

models_router = APIRouter(
    prefix="/v1", tags=["generation"], dependencies=[Depends(generation_caller)]
)
service_router = APIRouter(tags=["service"])


def package_version() -> str:
    try:
        return version("slipstream-spec")
    except PackageNotFoundError:
        return "0"


@models_router.get("/models")
def models(parts: Parts) -> dict[str, Any]:
    """The target that this server serves."""
    return {"object": "list", "data": [_model(parts)]}


@models_router.get("/models/{name:path}")
def one_model(name: str, parts: Parts) -> dict[str, Any]:
    """The target, by its name."""
    model = _model(parts)
    if name != model["id"]:
        message = f"the model {name!r} does not exist here"
        raise NotFound(message, param="model", code="model_not_found")
    return model


def _model(parts: ApiParts) -> dict[str, Any]:
    return {
        "id": parts.codec.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "slipstream",
        "max_model_len": parts.engine.status().max_context,
    }


@service_router.get("/health", responses={503: {"description": "the engine is dead"}})
def health(parts: Parts) -> Response:
    """200 while the engine runs, whatever else is down."""
    if parts.engine.status().alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "engine dead"}, 503)


@service_router.get("/ready", responses={503: {"description": "not yet, or the queue is full"}})
def ready(parts: Parts) -> Response:
    """200 if the server would accept a request now."""
    status = parts.engine.status()
    accepting = status.alive and status.waiting < parts.settings.max_waiting
    body = {"ready": accepting, "running": status.running, "waiting": status.waiting}
    return JSONResponse(body, 200 if accepting else 503)


@service_router.get("/version")
def service_version() -> dict[str, str]:
    """The service's version."""
    return {"version": package_version()}


@service_router.get("/metrics", response_class=Response)
def metrics(parts: Parts) -> Response:
    """Prometheus metrics."""
    _refresh_counts(parts)
    _refresh_buffers(parts)
    return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _refresh_counts(parts: ApiParts) -> None:
    """Reads the ledgers' counts. If the database is down, the last values stay."""
    try:
        for (route, state), count in parts.ledger.counts().items():
            parts.metrics.cycles.labels(route, state).set(count)
            if state in GATE_VERDICTS:
                parts.metrics.verdicts.labels(route, state).set(count)
        for (route, state), count in parts.canaries.counts().items():
            parts.metrics.canaries.labels(route, state).set(count)
    except SlipstreamError as error:
        log.warning("metrics: %s", error)


def _refresh_buffers(parts: ApiParts) -> None:
    """Reads the buffers' depths. If Redis is down, the last values stay."""
    try:
        for route in parts.settings.served_routes:
            depth = parts.buffer.depth(route)
            parts.metrics.buffer_signals.labels(route).set(depth.signals)
            parts.metrics.buffer_bytes.labels(route).set(depth.bytes)
    except RedisError as error:
        log.warning("metrics: the buffer does not answer: %s", error)
