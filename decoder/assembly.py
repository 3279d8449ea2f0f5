"""Builds an engine and the parts around it from the settings: for the service and for the lab."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sqlalchemy import Engine as DatabaseEngine

from decoder.device.placement import device_of, prefill_tokens, stay_on_one_core
from decoder.drafters.registry import teaching_by_route
from decoder.engine.engine import Engine, EngineLimits
from decoder.models.base import ServedModel
from decoder.models.fingerprint import fingerprint
from decoder.models.loading import (
    ModelFiles,
    end_ids,
    load_models,
    load_tokenizer,
    save_first_draft,
)
from decoder.recording.observation import RecordLimits
from decoder.recording.recorder import QUEUE_SIZE, Recorder
from decoder.rollout.canary import CanaryController
from decoder.rollout.installer import Installer
from decoder.rollout.live import LiveDraft
from decoder.rollout.swapper import Swapper
from decoder.sequence.text import HfCodec
from online.artifacts import ArtifactStore
from online.buffer import SignalBuffer
from online.canaries import CanaryLedger
from online.connections import git_commit
from online.metrics import ServiceMetrics
from online.registry import Registry
from online.rollout import RolloutGuard, Rules
from online.settings import Settings
from online.versions import Candidate


@dataclass(frozen=True)
class DecoderParts:
    """An engine and what it works with."""

    target: ServedModel
    drafts: Mapping[str, LiveDraft]  # by route
    codec: HfCodec
    engine: Engine
    recorder: Recorder
    metrics: ServiceMetrics


def assemble(
    settings: Settings,
    files: ModelFiles,
    buffer: SignalBuffer,
    max_context: int,
    queue_size: int = QUEUE_SIZE,
) -> DecoderParts:
    """Loads the models of `files` for all routes of `settings`. Starts no thread.

    `max_context` counts tokens of prompt and output together; `queue_size` is the recorder's.
    From here on, this thread and later ones compute on one core each; the engine's thread takes
    the others when it starts.
    """
    # One core is left to the API and the recorder. Torch's threads wait for each other at every
    # operation, so one that has to queue for its core stalls them all.
    threads = settings.threads or max(1, torch.get_num_threads() - 1)
    stay_on_one_core()
    device = device_of(settings.device)
    metrics = ServiceMetrics(files.name)
    target, drafts = _load(settings, files, device, max_context)
    codec = HfCodec(load_tokenizer(files), files.name, target.vocab_size)
    parents = dict.fromkeys(settings.cluster_routes, settings.default_route)
    recorder = Recorder(buffer, fingerprint(target), queue_size, metrics, parents)
    engine = Engine(
        target,
        drafts,
        codec.backend,
        end_ids(files.target),
        _limits(settings, device, max_context, threads),
        recorder,
        metrics,
        frozenset(settings.closed_routes),
        device,
    )
    return DecoderParts(target, drafts, codec, engine, recorder, metrics)


def _load(
    settings: Settings, files: ModelFiles, device: torch.device, max_context: int
) -> tuple[ServedModel, dict[str, LiveDraft]]:
    """The target and every route's draft, the clusters' included.

    Where candidates are tried first, routes have a second draft for the canary; clusters have none.
    """
    slots = settings.slots + settings.kept_contexts
    capacity = max_context + 1  # padding is written into the last cell
    (target,) = load_models(files.target, 1, slots, capacity, device, settings.dtype)
    served = settings.served_routes
    canaries = settings.routes if settings.canary_share else ()
    models = load_models(
        files.draft,
        len(served) + len(canaries),
        slots,
        capacity,
        device,
        settings.dtype,
        target.vocab_size,
    )
    drafts = {route: LiveDraft(route, models.pop(0)) for route in served}
    for route in canaries:
        drafts[route].canary = LiveDraft(route, models.pop(0))
    for route in settings.cluster_routes:
        drafts[route].follow(drafts[settings.default_route])
    return target, drafts


def _limits(
    settings: Settings, device: torch.device, max_context: int, threads: int
) -> EngineLimits:
    return EngineLimits(
        slots=settings.slots,
        kept_contexts=settings.kept_contexts,
        gamma=settings.gamma,
        prefill_tokens=settings.prefill_tokens or prefill_tokens(device),
        record=RecordLimits(settings.signal_top_k, settings.branch_tokens),
        max_waiting=settings.max_waiting,
        max_context=max_context,
        threads=threads,
    )


def build_swapper(settings: Settings, database: DatabaseEngine, parts: DecoderParts) -> Swapper:
    """Keeps the drafts of the settings' routes at their active versions. Not started."""
    artifacts = ArtifactStore(settings.artifacts_path)
    registry = Registry(database)
    drafts = {route: parts.drafts[route] for route in settings.served_routes}

    def first_draft() -> Candidate:
        digest = artifacts.publish(lambda folder: save_first_draft(ModelFiles.of(settings), folder))
        return Candidate(digest, {"origin": "first draft"}, {}, {}, git_commit())

    installer = Installer(parts.engine.between_steps, artifacts, lambda: fingerprint(parts.target))
    rules = Rules(settings.guard_requests, settings.canary_requests, settings.canary_margin)
    canaries = CanaryController(
        drafts, installer, registry, CanaryLedger(database), rules, parts.metrics
    )
    swapper = Swapper(
        drafts,
        installer,
        registry,
        first_draft,
        RolloutGuard(settings.guard_requests),
        canaries,
        parts.metrics,
        settings.poll_s,
        teaching_by_route(settings),
    )
    parts.engine.on_finished = swapper.finished
    return swapper
