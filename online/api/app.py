"""The application, built from its parts. Building it opens nothing."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI

from online.api import admin_changes, admin_views, generate, service
from online.api.edges import RequestEdges
from online.api.errors import add_error_handlers
from online.api.parts import ApiParts

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class SlipstreamApi(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The schema, with the names of the decoder's drafters."""
        schema = super().openapi()
        speculation = schema["components"]["schemas"]["Speculation"]
        name, _null = speculation["properties"]["drafter"]["anyOf"]
        name["enum"] = list(self.state.parts.drafters)
        return schema


def create_app(parts: ApiParts, lifespan: Lifespan | None = None) -> FastAPI:
    version = service.package_version()
    app = SlipstreamApi(title="Slipstream", version=version, lifespan=lifespan)
    app.state.parts = parts
    app.include_router(generate.router)
    app.include_router(admin_views.router)
    app.include_router(admin_changes.router)
    app.include_router(service.models_router)
    app.include_router(service.service_router)
    add_error_handlers(app)
    app.add_middleware(RequestEdges)
    return app


__all__ = ["ApiParts", "create_app"]
