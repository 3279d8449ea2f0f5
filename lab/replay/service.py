"""The service in one process.

Only HTTP, Celery and its clock are missing. A cycle runs on the engine's own thread at the moment
the clock would have started it, so a replay is the same on a busy machine and on an idle one.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from decoder.rollout.swapper import Swapper
from lab import rig
from lab.replay.config import Replay
from lab.replay.streams import StreamQuery
from lab.stored import stored
from lab.streams import Stream
from online.leases import UNFINISHED
from online.prompt_routes import PromptClusters
from online.registry import Registry
from online.signals import Signal, decode
from online.tables import Cycle, Version
from trainer.context import CycleContext
from trainer.cycle import run
from trainer.evaluation import Evaluation, evaluate
from trainer.scheduling import assess_route

LIVE = "live"  # the route that learns
FROZEN = "frozen"  # a route that keeps the first draft, for held-out queries
WRITTEN_LIMIT_S = 30.0
ALL = 10**6


class Service:
    def __init__(
        self,
        context: CycleContext,
        serving: rig.Rig,
        swapper: Swapper,
        config: Replay,
        clusters: PromptClusters | None,
    ) -> None:
        self.context, self._serving, self._swapper = context, serving, swapper
        self._config, self._clusters = config, clusters

    @property
    def registry(self) -> Registry:
        return self.context.registry

    @property
    def active(self) -> Version:
        version = self.registry.active(LIVE)
        assert version is not None, "the swapper registers a first draft"
        return version

    @property
    def first_draft(self) -> Path:
        return self.context.artifacts.path(self.registry.versions(LIVE)[-1].sha256)

    def versions(self) -> dict[str, int]:
        """The active version of every route that learns."""
        active = self.registry.active_versions().items()
        return {route: version.id for route, version in active if route != FROZEN}

    def put(self, versions: Mapping[str, int]) -> None:
        """Makes these the active versions again."""
        active, why = self.versions(), "drafts of an earlier time are measured"
        for route, version in versions.items():
            if active[route] != version:
                self.registry.activate(route, version, "manual", "replay", why)
        self._swapper.sync()

    def answer(
        self,
        asked: Sequence[StreamQuery],
        *,
        route: str = LIVE,
        gamma: int | None,
        store: bool,
        at_once: int = 0,
    ) -> list[Stream]:
        """Answers in order; γ None is the engine's own choice."""
        queries = [
            each.query(
                self._cluster(route, each.prompt_ids, learn=store),
                self._config.max_tokens,
                gamma=gamma,
                drafter="chain",
                store=store,
            )
            for each in asked
        ]
        written = self._written(route)
        answers = self._serving.complete(queries, at_once or self._config.at_once)
        if store:
            self._wait_until_written(route, written + len(answers))
        return answers

    def look(self) -> None:
        """Does what decoder and trainer do all the time.

        The guard sees the answers, due cycles run, promoted or rolled back drafts are swapped in.
        """
        self._swapper.watch()
        self._swapper.sync()
        for route in (LIVE, *self.context.settings.cluster_routes):
            self._look(route)

    def _look(self, route: str) -> None:
        context = self.context
        requested = context.ledger.unfinished(route)  # left by a run that was stopped
        if requested is None:
            need = assess_route(
                context.buffer, context.ledger, self.registry, route, context.settings
            )
            if not need.due:
                return
            requested, _ = context.ledger.request(route, "replay", need.reason)
        lease = context.ledger.take(requested.id, lease_s=0)
        assert lease is not None, "no other trainer works here"

        def learn() -> str:
            with torch.inference_mode(False), torch.enable_grad():
                return run(context, lease)

        self._serving.engine.between_steps(learn).result()
        self._swapper.sync()

    def evaluate(self, draft: Path, signals: Sequence[Signal]) -> Evaluation:
        """Expected tokens of a step and acceptance on each signal's answer, with this draft.

        Answers are the target's, whichever draft served them, so all drafts share them.
        """

        def found() -> Evaluation:
            module = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
            pad_id = int(module.config.pad_token_id or 0)
            return evaluate(module, signals, self._config.gamma, pad_id)

        return self._serving.engine.between_steps(found).result()

    def evaluate_live(self, signals: Sequence[Signal]) -> Evaluation:
        """The same with the live drafts: for each signal, the draft of its prompt's route."""
        prompts = [signal.prompt_ids.tolist() for signal in signals]
        routes = [self._cluster(LIVE, prompt, learn=False) for prompt in prompts]
        tokens, acceptance = np.zeros(len(signals)), np.zeros(len(signals))
        for route in set(routes):
            version = self.registry.serving(route)
            assert version is not None, "the swapper registers a first draft"
            own = [i for i, its in enumerate(routes) if its == route]
            draft = self.context.artifacts.path(version.sha256)
            tokens[own], acceptance[own] = self.evaluate(draft, [signals[i] for i in own])
        return Evaluation(tokens, acceptance)

    def finished(self) -> list[Cycle]:
        """Every cycle that has ended, newest first."""
        cycles = self.context.ledger.cycles(limit=ALL)
        return [cycle for cycle in cycles if cycle.state not in UNFINISHED]

    def newest(self, route: str, count: int = ALL) -> list[Signal]:
        """The route's last signals, oldest first."""
        return [decode(entry.record) for entry in stored(self.context.buffer, route, count)]

    def _cluster(self, route: str, prompt_ids: Sequence[int], *, learn: bool) -> str:
        """The cluster of a prompt on the live route, where there are clusters."""
        if self._clusters is None or route != LIVE:
            return route
        return self._clusters.route(prompt_ids, learn=learn)

    def _written(self, route: str) -> float:
        registry, labels = self._serving.metrics.registry, {"route": route}
        return registry.get_sample_value("slipstream_signals_written_total", labels) or 0.0

    def _wait_until_written(self, route: str, count: float) -> None:
        """Signals are written after the answers; without waiting no two replays would agree."""
        deadline = time.monotonic() + WRITTEN_LIMIT_S
        while self._written(route) < count and time.monotonic() < deadline:
            time.sleep(0.01)
