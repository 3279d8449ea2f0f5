"""The parts of the service that the endpoints use, and how an endpoint gets them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Request

from online.artifacts import ArtifactStore
from online.buffer import SignalBuffer
from online.canaries import CanaryLedger
from online.cycles import CycleLedger
from online.drafters import DrafterDescription
from online.messages import EngineClient, TextCodec
from online.metrics import ServiceMetrics
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.settings import Settings


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
    drafters: Mapping[str, DrafterDescription]  # of the decoder
    clusters: PromptClusters | None = None  # None: prompts are not clustered


async def parts_of(request: Request) -> ApiParts:
    """The parts that `create_app` stored with the application."""
    parts: ApiParts = request.app.state.parts
    return parts


Parts = Annotated[ApiParts, Depends(parts_of)]
