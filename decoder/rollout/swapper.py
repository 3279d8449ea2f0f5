"""The swapper: a thread that keeps every route's draft at its active version.

Each round, it syncs the drafts with the registry, follows the canaries, and watches finished
requests. It polls the database, and the admin API of the same process wakes it early: a rollback
needs neither Redis nor the trainer. While the database is away, loaded drafts serve on.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from decoder.device.placement import stay_on_one_core
from decoder.rollout.canary import CanaryController
from decoder.rollout.installer import Installer, LoadFailures
from decoder.rollout.live import LiveDraft
from online.drafters import Teaching
from online.errors import ArtifactError, Conflict, SlipstreamError
from online.messages import Loaded, SpeculationStats
from online.metrics import ServiceMetrics
from online.registry import Registry
from online.rollout import Regression, RolloutGuard
from online.tables import Version
from online.versions import GENERIC, Candidate, is_generic

log = logging.getLogger("slipstream.swap")

Finished = tuple[str, SpeculationStats, float]  # route, figures, arrival time
RETRY_S = 10.0  # from a failure to load, or to serve, until the version is tried again


class Swapper:
    def __init__(
        self,
        drafts: Mapping[str, LiveDraft],
        installer: Installer,
        registry: Registry,
        first_draft: Callable[[], Candidate],
        guard: RolloutGuard,
        canaries: CanaryController,
        metrics: ServiceMetrics,
        poll_s: float,
        teaching: Mapping[str, Teaching],
    ) -> None:
        """`drafts` by route. `first_draft` publishes the first version of a new route.

        `teaching` is what routes' drafters need to be taught; the registry tells the trainer.
        """
        self.installer = installer
        self._drafts, self._first_draft = drafts, first_draft
        self._registry, self._metrics = registry, metrics
        self._guard, self._canaries = guard, canaries
        self._poll_s = poll_s
        self._unannounced: Mapping[str, Teaching] = teaching  # empty once the registry has it
        self._finished: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._failures = LoadFailures(RETRY_S)
        self._followed: dict[str, int] = {}  # cluster → generic version that it last followed
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="swapper", daemon=True)

    # ── called from other threads ──

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(5)

    def nudge(self) -> None:
        """An activation was written: look now instead of at the next poll."""
        self._wake.set()

    def finished(self, route: str, stats: SpeculationStats, arrived_s: float) -> None:
        """A request ended. Called on the engine's thread, so it only queues a note."""
        self._finished.put((route, stats, arrived_s))

    def loaded(self) -> dict[str, Loaded]:
        """What every route serves, and why it may not serve its active version."""
        return {
            route: Loaded(draft.serving, self._failures.message(route), self._canaries.seen(route))
            for route, draft in self._drafts.items()
        }

    # ── the swapper's thread ──

    def _run(self) -> None:
        stay_on_one_core()
        while not self._stopping:
            try:
                self.sync()
                self._canaries.follow()
                self.watch()
            except SlipstreamError as error:
                log.warning("Draft versions can't be synced: %s", error)
            except Exception:
                log.exception("Draft versions can't be synced.")
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def sync(self) -> None:
        """Loads the active version of every route where another one is loaded.

        A new route gets its first version: the configured draft or, if a cluster, the generic one.
        """
        active = self._registry.active_versions()
        for route, draft in self._drafts.items():
            version = active.get(route) or self._register_first(draft)
            self._metrics.active_version.labels(route).set(version.id)
            if draft.generic is not None and is_generic(version):
                self._follow(draft, draft.generic)
            elif draft.version == version.id and (draft.usable or draft.failed_within(RETRY_S)):
                # A draft that failed while serving is loaded anew, but not at every poll.
                self._failures.clear(route)
                draft.follows = False
            elif not self._failures.block(route, version.id):
                self._swap(draft, version)
        if self._unannounced:
            self._registry.set_teaching(self._unannounced)
            self._unannounced = {}

    def _register_first(self, draft: LiveDraft) -> Version:
        self._registry.ensure_routes((draft.route,))
        if draft.generic is None:
            return self._registry.register_first(draft.route, self._first_draft(), "decoder")
        parent = self._registry.active(draft.generic.route)
        assert parent is not None, "the default route comes before its clusters"
        generic = Candidate(parent.sha256, {"origin": GENERIC}, {}, {}, parent.git_commit)
        return self._registry.register_first(draft.route, generic, "decoder", parent.id)

    def _follow(self, draft: LiveDraft, generic: LiveDraft) -> None:
        """The cluster has no draft of its own: the generic draft serves it, and nothing loads."""
        draft.follow(generic)
        self._failures.clear(draft.route)
        if self._followed.get(draft.route) == generic.version:
            return
        self._followed[draft.route] = generic.version
        self._guard.started(draft.route, generic.version, watched=False)
        self._metrics.loaded_version.labels(draft.route).set(generic.version)

    def _swap(self, draft: LiveDraft, version: Version) -> None:
        route = draft.route
        try:
            pause_s = self.installer.load(draft, version)
        except ArtifactError as error:
            self._failures.add(route, version.id, error.message)
            self._metrics.swaps.labels(route, "refused").inc()
            log.error("Route %s stays on version %d: %s", route, draft.version, error)
            return
        self._failures.clear(route)
        self._followed.pop(route, None)
        newest = self._registry.activations(route, limit=1)[0]
        self._guard.started(route, version.id, watched=newest.kind in ("promotion", "manual"))
        self._metrics.swaps.labels(route, "done").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.loaded_version.labels(route).set(version.id)
        log.info("Route %s runs version %d (pause %.1f ms).", route, version.id, pause_s * 1000)

    def watch(self) -> None:
        """Shows finished requests to guard and canaries, and acts on what they decide."""
        while not self._finished.empty():
            route, stats, arrived_s = self._finished.get_nowait()
            # A request that two versions served says nothing about either.
            if len(stats.versions) == 1 and route in self._drafts:
                self._observe(route, stats.versions[0][2], stats.acceptance_rate, arrived_s)
        if self._canaries.decide():
            self._wake.set()
        for route in self._drafts:
            live = self._guard.live(route)
            if live is not None:
                self._metrics.acceptance.labels(route).set(live)

    def _observe(self, route: str, version: int, rate: float | None, arrived_s: float) -> None:
        for name in self._drafts[route].routes:
            self._canaries.observe(name, version, rate, arrived_s)
            found = None if rate is None else self._guard.observe(name, version, rate)
            if found is not None:
                self._roll_back(found)

    def _roll_back(self, found: Regression) -> None:
        route, version, reason = found.route, found.version, found.reason
        if self._registry.route(route).frozen:
            self._registry.record("guard", "rollback:held", route, f"frozen; {reason}")
            return
        try:
            self._registry.rollback(route, "auto_rollback", "guard", reason, expected=version)
        except Conflict as error:
            log.info("Route %s is not rolled back: %s", route, error)
        else:
            log.warning("Route %s was rolled back: %s", route, reason)
            self._wake.set()
