"""Starts the service of a replay: engine, recorder, a real buffer and registry, cycles, swaps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from decoder.assembly import build_swapper
from decoder.models.loading import ModelFiles
from lab import rig
from lab.replay.config import Replay
from lab.replay.service import FROZEN, LIVE, Service
from migrations import upgrade
from online.database import connect
from online.embedded_redis import start_server
from online.prompt_routes import PromptClusters
from online.settings import Settings
from trainer.context import CycleContext


@contextmanager
def serve(config: Replay, settings: Settings, folder: Path) -> Iterator[Service]:
    """A service that keeps its state in `folder`, and finds it there again."""
    max_bytes = settings.redis_bytes(2 + settings.learnt_routes)
    server, url = start_server(folder / "redis", max_bytes=max_bytes)
    own = {"data_dir": folder, "redis_url": url, "routes": (LIVE,)}
    settings = settings.model_copy(update=own)
    try:
        upgrade(settings.sql_url)
        context, clusters = CycleContext.of(settings), PromptClusters.of(settings)
        with _engine(config, context) as serving:
            swapper = build_swapper(settings, connect(settings.sql_url), serving.parts)
            swapper.sync()
            try:
                yield Service(context, serving, swapper, config, clusters)
            finally:
                if clusters is not None:
                    clusters.save()
    finally:
        server.terminate()
        server.wait(10)


def _engine(config: Replay, context: CycleContext) -> AbstractContextManager[rig.Rig]:
    settings, files = context.settings, ModelFiles.of(context.settings)
    longest, threads = [[0] * config.longest_prompt], torch.get_num_threads()
    pair = rig.Pair(files, longest, config.dtype, settings.device, threads)
    return rig.rig(
        pair,
        files.draft,
        config.at_once,
        gamma=config.gamma,
        max_tokens=config.max_tokens,
        kept_contexts=0,
        routes=(LIVE, FROZEN),
        clusters=settings.learnt_routes,
        buffer=context.buffer,
        settings=settings,
    )
