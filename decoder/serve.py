"""The decoder process: builds all parts from the settings and serves. `python -m decoder.serve`."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import transformers
import uvicorn
from fastapi import FastAPI

from decoder.assembly import DecoderParts, assemble, build_swapper
from decoder.drafters.registry import check_settings, descriptions
from decoder.models.loading import ModelFiles, context_limit, refuse_windows
from decoder.rollout.swapper import Swapper
from decoder.service import DecoderService
from online.api.app import ApiParts, create_app
from online.artifacts import ArtifactStore
from online.canaries import CanaryLedger
from online.connections import celery_app, signal_buffer
from online.cycles import CycleLedger
from online.database import connect
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.settings import Settings, warn_about_unknown_variables

log = logging.getLogger("slipstream.serve")

# Clients (httpx, and so openai) drop an idle connection after five seconds. A server that closed
# it at that moment would reset the request just sent on it.
KEEP_ALIVE_S = 75
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build(settings: Settings) -> FastAPI:
    """The application with everything behind it. Its threads start and stop with it.

    Raises:
        InvalidRequest: a model can't be served with these settings.
    """
    check_settings(settings)
    files = ModelFiles.of(settings)
    database = connect(settings.sql_url)
    buffer = signal_buffer(settings)
    decoder = assemble(settings, files, buffer, _max_context(settings, files))
    swapper = build_swapper(settings, database, decoder)
    clusters = PromptClusters.of(settings)
    parts = ApiParts(
        settings=settings,
        engine=DecoderService(decoder.engine, swapper),
        codec=decoder.codec,
        registry=Registry(database),
        ledger=CycleLedger(database),
        canaries=CanaryLedger(database),
        buffer=buffer,
        artifacts=ArtifactStore(settings.artifacts_path),
        celery=celery_app(settings),
        metrics=decoder.metrics,
        drafters=descriptions(),
        clusters=clusters,
    )
    return create_app(parts, _lifespan(decoder, swapper, clusters))


def _max_context(settings: Settings, files: ModelFiles) -> int:
    """The longest context that settings and both models allow."""
    limits = context_limit(files.target), context_limit(files.draft)
    max_context = min(settings.max_context, *limits)
    for source in (files.target, files.draft):
        refuse_windows(source, max_context)
    return max_context


def _lifespan(decoder: DecoderParts, swapper: Swapper, clusters: PromptClusters | None) -> Lifespan:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        decoder.recorder.start()
        decoder.engine.start()
        swapper.start()
        yield
        swapper.stop()
        decoder.engine.stop()
        decoder.recorder.stop()
        if clusters is not None:
            clusters.save()

    return lifespan


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = Settings()
    warn_about_unknown_variables()
    if not settings.admin_keys:
        log.warning(
            "No API keys are configured. The server binds to %s, and every caller is an admin.",
            settings.bind_host,
        )
    uvicorn.run(
        build(settings),
        host=settings.bind_host,
        port=settings.port,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_S,
    )


if __name__ == "__main__":
    main()
