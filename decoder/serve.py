"""The decoder process: builds every part from the settings, then serves. `python -m decoder.serve`."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import torch
import transformers
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine as DatabaseEngine

from decoder.device.placement import device_of, prefill_tokens, stay_on_one_core
from decoder.drafters.registry import check_settings, descriptions, teaching_by_route
from decoder.engine.engine import Engine, EngineLimits
from decoder.models.base import ServedModel
from decoder.models.fingerprint import fingerprint
from decoder.models.loading import (
    ModelFiles,
    context_limit,
    end_ids,
    load_models,
    load_tokenizer,
    refuse_windows,
    save_first_draft,
)
from decoder.recording.observation import RecordLimits
from decoder.recording.recorder import QUEUE_SIZE, Recorder
from decoder.rollout.canary import CanaryController
from decoder.rollout.installer import Installer
from decoder.rollout.live import LiveDraft
from decoder.rollout.swapper import Swapper
from decoder.sequence.text import HfCodec
from decoder.service import DecoderService
from online.api.app import ApiParts, create_app
from online.artifacts import ArtifactStore
from online.canaries import CanaryLedger
from online.connections import celery_app, git_commit, signal_buffer
from online.cycles import CycleLedger
from online.database import connect
from online.metrics import ServiceMetrics
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.rollout import RolloutGuard, Rules
from online.settings import Settings, warn_about_unknown_variables
from online.versions import Candidate

log = logging.getLogger("slipstream.serve")

# Clients forget an idle connection after five seconds (httpx, and so openai). A server that closes it at that very
# moment resets the request that was just sent on it.
KEEP_ALIVE_S = 75


def build(settings: Settings) -> FastAPI:
    """The application with everything behind it. Threads start with the application and stop with it."""
    # One core is left to the API, the recorder and whoever shares the machine: torch's threads wait for each other at
    # every operation, and one that has to queue for its core stalls them all.
    threads = settings.threads or max(1, torch.get_num_threads() - 1)
    stay_on_one_core()
    check_settings(settings)
    files, device = ModelFiles.of(settings), device_of(settings.device)
    metrics = ServiceMetrics(files.name)
    max_context = min(settings.max_context, context_limit(files.target), context_limit(files.draft))
    for source in (files.target, files.draft):
        refuse_windows(source, max_context)

    codec, target, drafts = _load(settings, files, device, max_context)
    database = connect(settings.sql_url)
    registry, ledger = Registry(database), CycleLedger(database)
    buffer = signal_buffer(settings)
    parts_of = dict.fromkeys(settings.cluster_routes, settings.default_route)
    recorder = Recorder(buffer, fingerprint(target), QUEUE_SIZE, metrics, parts_of)
    clusters = PromptClusters.of(settings)
    limits = EngineLimits(
        slots=settings.slots,
        kept_contexts=settings.kept_contexts,
        gamma=settings.gamma,
        prefill_tokens=settings.prefill_tokens or prefill_tokens(device),
        record=RecordLimits(settings.signal_top_k, settings.branch_tokens),
        max_waiting=settings.max_waiting,
        max_context=max_context,
        threads=threads,
    )
    engine = Engine(
        target,
        drafts,
        codec.backend,
        end_ids(files.target),
        limits,
        recorder,
        metrics,
        frozenset(settings.closed_routes),
        device,
    )
    installer = Installer(
        engine.between_steps, ArtifactStore(settings.artifacts_path), lambda: fingerprint(target)
    )
    swapper = follower(settings, database, engine, drafts, installer, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recorder.start()
        engine.start()
        swapper.start()
        yield
        swapper.stop()
        engine.stop()
        recorder.stop()
        if clusters is not None:
            clusters.save()

    parts = ApiParts(
        settings=settings,
        engine=DecoderService(engine, swapper, installer),
        codec=codec,
        registry=registry,
        ledger=ledger,
        canaries=CanaryLedger(database),
        buffer=buffer,
        artifacts=ArtifactStore(settings.artifacts_path),
        celery=celery_app(settings),
        metrics=metrics,
        drafters=descriptions(),
        clusters=clusters,
    )
    return create_app(parts, lifespan)


def _load(
    settings: Settings, files: ModelFiles, device: torch.device, max_context: int
) -> tuple[HfCodec, ServedModel, dict[str, LiveDraft]]:
    tokenizer = load_tokenizer(files)
    # One cell more than a context can fill: padding is written there.
    size = settings.slots + settings.kept_contexts, max_context + 1
    (target,) = load_models(files.target, 1, *size, device, settings.dtype)
    # Each route's draft and, where candidates are tried first, room for one beside it; but not beside a cluster's.
    count = len(settings.served_routes) + (len(settings.routes) if settings.canary_share else 0)
    models = iter(load_models(files.draft, count, *size, device, settings.dtype, target.vocab_size))
    drafts = {route: LiveDraft(route, next(models)) for route in settings.served_routes}
    for draft, room in zip(drafts.values(), models, strict=False):
        draft.canary = LiveDraft(draft.route, room)
    for route in settings.cluster_routes:
        drafts[route].follow(drafts[settings.default_route])
    return HfCodec(tokenizer, files.name, target.vocab_size), target, drafts


def follower(
    settings: Settings,
    database: DatabaseEngine,
    engine: Engine,
    drafts: Mapping[str, LiveDraft],
    installer: Installer,
    metrics: ServiceMetrics,
) -> Swapper:
    """What keeps the engine's `drafts` at the versions that the registry says, and watches them. Not started."""
    registry, artifacts = Registry(database), ArtifactStore(settings.artifacts_path)

    def first_draft() -> Candidate:
        digest = artifacts.publish(lambda folder: save_first_draft(ModelFiles.of(settings), folder))
        return Candidate(digest, {"origin": "first draft"}, {}, {}, git_commit())

    rules = Rules(settings.guard_requests, settings.canary_requests, settings.canary_margin)
    canaries = CanaryController(drafts, installer, registry, CanaryLedger(database), rules, metrics)
    guard = RolloutGuard(settings.guard_requests)
    swapper = Swapper(
        drafts,
        installer,
        registry,
        first_draft,
        guard,
        canaries,
        metrics,
        settings.poll_s,
        teaching_by_route(settings),
    )
    engine.on_finished = swapper.finished
    return swapper


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = Settings()
    warn_about_unknown_variables()
    if not settings.admin_keys:
        log.warning(
            "no API keys are configured: bound to %s, and every caller is an admin",
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
