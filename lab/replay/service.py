"""The service in one process: the engine, its recorder, a real buffer and registry, cycles, gate and swaps.

What is missing beside `slipstream up` is what carries it: HTTP, Celery and its clock. A cycle runs where the clock
would have started one, on the engine's own thread, so that a replay is the same on a busy machine and on an idle one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from decoder.models.fingerprint import fingerprint
from decoder.models.loading import ModelFiles
from decoder.rollout.installer import Installer
from decoder.rollout.swapper import Swapper
from decoder.serve import follower
from lab import rig
from lab.replay.config import Replay
from lab.replay.streams import Asked
from lab.stored import stored
from migrations import upgrade
from online.database import connect
from online.embedded_redis import start_server
from online.leases import UNFINISHED
from online.messages import DrafterName, Query
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.settings import Settings
from online.signals import Signal, decode
from online.tables import Cycle, Version
from trainer.context import CycleContext
from trainer.cycle import run
from trainer.evaluation import Evaluation, evaluate
from trainer.scheduling import assess_route

LIVE, FROZEN = (
    "live",
    "frozen",
)  # the route that learns, and one that keeps the first draft, for exams
SETTLE_S = 30.0


class Service:
    def __init__(
        self,
        context: CycleContext,
        serving: rig.Rig,
        swapper: Swapper,
        config: Replay,
        clusters: PromptClusters | None,
    ) -> None:
        self.context, self._serving, self._swapper, self._config = context, serving, swapper, config
        self._clusters = clusters

    @property
    def registry(self) -> Registry:
        return self.context.registry

    @property
    def active(self) -> Version:
        version = self.registry.active(LIVE)
        assert version is not None, "the swapper registers a first draft"
        return version

    def versions(self) -> dict[str, int]:
        """The active version of every route that learns."""
        return {
            route: version.id
            for route, version in self.registry.active_versions().items()
            if route != FROZEN
        }

    def put(self, versions: Mapping[str, int]) -> None:
        """Makes these the active versions again."""
        active = self.versions()
        for route, version in versions.items():
            if active[route] != version:
                self.registry.activate(
                    route, version, "manual", "replay", "drafts of an earlier time are measured"
                )
        self._swapper.sync()

    @property
    def first_draft(self) -> Path:
        return self.context.artifacts.path(self.registry.versions(LIVE)[-1].sha256)

    def answer(
        self,
        asked: Sequence[Asked],
        *,
        route: str = LIVE,
        gamma: int | None,
        store: bool,
        at_once: int = 0,
        drafter: DrafterName = "chain",
    ) -> list[rig.Answer]:
        """Answers in order. γ None: the engine's own choice."""
        queries = [
            Query(
                id=one.name,
                route=self._sorted(route, one.prompt_ids, learn=store),
                prompt_ids=one.prompt_ids,
                max_tokens=self._config.max_tokens,
                temperature=one.temperature,
                seed=one.seed,
                gamma=gamma,
                drafter=drafter,
                store=store,
            )
            for one in asked
        ]
        written = self._written(route)
        answers = self._serving.complete(queries, at_once or self._config.at_once)
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{len(failed)} queries failed: {failed[0]}")
        if store:
            self._settle(route, written + len(answers))
        return answers

    def look(self) -> None:
        """What decoder and trainer do all the time: the guard sees what was answered, a cycle runs where it is due.

        What is promoted or rolled back is swapped in.
        """
        self._swapper.watch()
        self._swapper.sync()
        for route in (LIVE, *self.context.settings.cluster_routes):
            self._look(route)

    def _look(self, route: str) -> None:
        context = self.context
        requested = context.ledger.unfinished(route)  # a run that was stopped has left it
        if requested is None:
            need = assess_route(
                context.buffer, context.ledger, context.registry, route, context.settings
            )
            if not need.due:
                return
            requested, _ = context.ledger.request(route, "replay", need.reason)
        lease = context.ledger.take(requested.id, lease_s=0)
        assert lease is not None, "nobody else works here"

        def learn() -> str:
            with torch.inference_mode(False), torch.enable_grad():
                return run(context, lease)

        self._serving.engine.between_steps(learn).result()
        self._swapper.sync()

    def judge(self, draft: Path, signals: Sequence[Signal]) -> Evaluation:
        """Expected tokens of a step with γ, and acceptance, of each signal's answer, had this draft drafted for it.

        Answers are the target's whoever drafts, so drafts are compared on the very same ones.
        """

        def look() -> Evaluation:
            module = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
            pad_id = int(module.config.pad_token_id or 0)
            return evaluate(module, signals, self._config.gamma, pad_id)

        return self._serving.engine.between_steps(look).result()

    def judge_live(self, signals: Sequence[Signal]) -> Evaluation:
        """The same of the drafts that are live: of each signal, the one that its prompt gets."""
        routes = [self._sorted(LIVE, signal.prompt_ids.tolist(), learn=False) for signal in signals]
        tokens, acceptance = np.zeros(len(signals)), np.zeros(len(signals))
        for route in set(routes):
            version = self.registry.serving(route)
            assert version is not None, "the swapper registers a first draft"
            own = [i for i, its in enumerate(routes) if its == route]
            draft = self.context.artifacts.path(version.sha256)
            tokens[own], acceptance[own] = self.judge(draft, [signals[i] for i in own])
        return Evaluation(tokens, acceptance)

    def _sorted(self, route: str, prompt_ids: Sequence[int], *, learn: bool) -> str:
        """The live route's prompts go to their clusters, where there are any."""
        return (
            self._clusters.route(prompt_ids, learn=learn)
            if self._clusters and route == LIVE
            else route
        )

    def finished(self) -> list[Cycle]:
        """Every cycle that has ended, newest first."""
        return [
            cycle
            for cycle in self.context.ledger.cycles(limit=10**6)
            if cycle.state not in UNFINISHED
        ]

    def newest(self, route: str, count: int = 10**6) -> list[Signal]:
        """The route's last signals, oldest first."""
        return [decode(entry.record) for entry in stored(self.context.buffer, route, count)]

    def _written(self, route: str) -> float:
        registry = self._serving.metrics.registry
        return (
            registry.get_sample_value("slipstream_signals_written_total", {"route": route}) or 0.0
        )

    def _settle(self, route: str, count: float) -> None:
        """Signals are written after clients have their answers: without waiting no two replays would be alike."""
        deadline = time.monotonic() + SETTLE_S
        while self._written(route) < count and time.monotonic() < deadline:
            time.sleep(0.01)


@contextmanager
def serve(config: Replay, settings: Settings, folder: Path) -> Iterator[Service]:
    """A service that keeps all it knows in `folder`, and finds it again there."""
    server, url = start_server(
        folder / "redis", max_bytes=settings.redis_bytes(2 + settings.learnt_routes)
    )
    try:
        settings = settings.model_copy(
            update={"data_dir": folder, "redis_url": url, "routes": (LIVE,)}
        )
        upgrade(settings.sql_url)
        context = CycleContext.of(settings)
        files = ModelFiles.of(settings)
        pair = rig.Pair(
            files,
            [[0] * config.longest_prompt],
            config.dtype,
            settings.device,
            torch.get_num_threads(),
        )
        own = {"gamma": config.gamma, "max_tokens": config.max_tokens, "kept_contexts": 0}
        routes, clusters = (LIVE, FROZEN), settings.cluster_routes
        with rig.rig(
            pair,
            files.draft,
            config.at_once,
            routes=routes,
            clusters=clusters,
            buffer=context.buffer,
            settings=settings,
            **own,
        ) as serving:
            engine = serving.engine
            drafts = {route: engine.batch.drafts[route] for route in settings.served_routes}
            installer = Installer(
                engine.between_steps, context.artifacts, lambda: fingerprint(engine.batch.target)
            )  # type: ignore[arg-type]
            swapper = follower(
                settings, connect(settings.sql_url), engine, drafts, installer, serving.metrics
            )
            swapper.sync()
            sorting = PromptClusters.of(settings)
            try:
                yield Service(context, serving, swapper, config, sorting)
            finally:
                if sorting is not None:
                    sorting.save()
    finally:
        server.terminate()
        server.wait(10)
