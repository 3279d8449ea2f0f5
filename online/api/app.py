"""The application: endpoints, error shapes, request ids, body limit. Built from parts; opens nothing by itself."""

import logging
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from celery import Celery
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis import RedisError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from online.api import admin, generate
from online.api.auth import requires
from online.api.job import ClientGone
from online.artifacts import ArtifactStore
from online.buffer import SignalBuffer
from online.canaries import CanaryLedger
from online.cycles import CycleLedger
from online.errors import InvalidRequest, NotFound, SlipstreamError
from online.messages import EngineClient, TextCodec
from online.metrics import ServiceMetrics
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.settings import Settings

log = logging.getLogger("slipstream.api")

MAX_BODY_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ApiParts:
    settings: Settings
    engine: EngineClient
    codec: TextCodec
    registry: Registry
    ledger: CycleLedger
    canaries: CanaryLedger
    buffer: SignalBuffer
    artifacts: ArtifactStore
    celery: Celery
    metrics: ServiceMetrics
    clusters: PromptClusters | None = None  # of the default route, where they are learnt


def create_app(
    parts: ApiParts, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None
) -> FastAPI:
    app = FastAPI(title="Slipstream", version=_version(), lifespan=lifespan)
    generation = requires(parts.settings.generation_keys, "a generation key")
    admins = requires(parts.settings.admin_keys, "an admin key")
    generator = generate.Generator(parts.settings, parts.engine, parts.codec, parts.clusters)
    app.include_router(generate.router(generator, generation))
    operator = admin.Admin(
        parts.settings,
        parts.engine,
        parts.registry,
        parts.ledger,
        parts.canaries,
        parts.buffer,
        parts.artifacts,
        parts.celery,
        parts.clusters,
    )
    app.include_router(admin.router(operator, admins))
    _add_models(app, parts, generation)
    _add_health(app, parts)
    _add_error_handlers(app)
    app.add_middleware(RequestEdges)
    return app


def _add_models(app: FastAPI, parts: ApiParts, authenticated: Callable[[Request], str]) -> None:
    model = {
        "id": parts.codec.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "slipstream",
        "max_model_len": parts.engine.status().max_context,
    }

    @app.get("/v1/models", dependencies=[Depends(authenticated)], tags=["generation"])
    def models() -> dict[str, Any]:
        """The target that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(authenticated)], tags=["generation"])
    def one_model(name: str) -> dict[str, Any]:
        """The target, by its name."""
        if name != model["id"]:
            raise NotFound(
                f"the model {name!r} does not exist here", param="model", code="model_not_found"
            )
        return model


def _add_health(app: FastAPI, parts: ApiParts) -> None:
    @app.get("/health", tags=["service"], responses={503: {"description": "the engine is dead"}})
    def health() -> Response:
        """200 while the engine runs, whatever else is down."""
        alive = parts.engine.status().alive
        return JSONResponse({"status": "ok" if alive else "engine dead"}, 200 if alive else 503)

    @app.get(
        "/ready",
        tags=["service"],
        responses={503: {"description": "not yet, or the queue is full"}},
    )
    def ready() -> Response:
        """200 when a request sent now would be taken."""
        status = parts.engine.status()
        taking = status.alive and status.waiting < parts.settings.max_waiting
        return JSONResponse(
            {"ready": taking, "running": status.running, "waiting": status.waiting},
            200 if taking else 503,
        )

    @app.get("/version", tags=["service"])
    def service_version() -> dict[str, str]:
        """The service's version."""
        return {"version": _version()}

    @app.get("/metrics", tags=["service"], response_class=Response)
    def metrics() -> Response:
        """Prometheus metrics."""
        _refresh(parts)
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _refresh(parts: ApiParts) -> None:
    """Gauges that live elsewhere are read when someone looks. A part that is down keeps its last value."""
    try:
        for (route, state), count in parts.ledger.counts().items():
            parts.metrics.cycles.labels(route, state).set(count)
            if state in ("promoted", "canary", "held", "rejected"):
                parts.metrics.verdicts.labels(route, state).set(count)
        for (route, state), count in parts.canaries.counts().items():
            parts.metrics.canaries.labels(route, state).set(count)
    except SlipstreamError as error:
        log.warning("metrics: %s", error)
    try:
        for route in parts.settings.served_routes:
            depth = parts.buffer.depth(route)
            parts.metrics.buffer_signals.labels(route).set(depth.signals)
            parts.metrics.buffer_bytes.labels(route).set(depth.bytes)
    except RedisError as error:
        log.warning("metrics: the buffer does not answer: %s", error)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SlipstreamError)
    async def known(request: Request, error: SlipstreamError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_invalid(error).body(), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        wrapped = InvalidRequest(
            str(error.detail), code=str(error.detail).lower().replace(" ", "_")
        )
        return JSONResponse(wrapped.body(), error.status_code, error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return JSONResponse(SlipstreamError("internal error").body(), 500)


def _invalid(error: RequestValidationError) -> InvalidRequest:
    """The first fault, in words: the field's path and the reason."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(
            f"unknown field: {'.'.join(path)}", param=".".join(path), code="unknown_field"
        )
    # Alternatives of a union name themselves in the path; the field is what the caller knows.
    param = path[0] if path else None
    return InvalidRequest(f"{'.'.join(path) or 'body'}: {first['msg']}", param=param)


class RequestEdges:
    """Gives every response an X-Request-Id (the client's own, if it sent one) and refuses oversized bodies.

    Plain ASGI: middleware that wraps the response would hide disconnects.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body exceeds {MAX_BODY_BYTES} bytes")
            return message

        async def identified(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message.get("headers", []), (b"x-request-id", request_id)],
                }
            await send(message)

        await self._app(scope, counted, identified)


def _version() -> str:
    try:
        return version("slipstream-spec")
    except PackageNotFoundError:
        return "0"
