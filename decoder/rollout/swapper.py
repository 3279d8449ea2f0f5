"""The swapper: follows the registry's active versions, stages weights aside and has the engine copy them in.

It polls the database, and the admin API of the same process wakes it: a rollback therefore needs neither Redis nor the
trainer. When the database is away, the drafts that are loaded go on serving.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from decoder.device.placement import stay_on_one_core
from decoder.rollout.canary import CanaryController
from decoder.rollout.installer import Installer
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

RETRY_S = 10.0  # a version that could not be loaded, or failed, is tried again after this long


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
        self._drafts, self._installer, self._registry = drafts, installer, registry
        self._first_draft, self._guard, self._canaries = first_draft, guard, canaries
        self._metrics, self._poll_s = metrics, poll_s
        self._unannounced: Mapping[str, Teaching] = teaching  # empty once the registry has it
        self._finished: queue.SimpleQueue[tuple[str, SpeculationStats, float]] = queue.SimpleQueue()
        self._errors: dict[
            str, tuple[int, str, float]
        ] = {}  # route → version, why, when to try again
        self._followed: dict[
            str, int
        ] = {}  # cluster → the generic draft's version that it was last seen with
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="swapper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(5)

    def nudge(self) -> None:
        self._wake.set()

    def finished(self, route: str, stats: SpeculationStats, arrived_s: float) -> None:
        """A request ended: called on the engine's thread, so it only leaves a note."""
        self._finished.put((route, stats, arrived_s))

    def loaded(self) -> dict[str, Loaded]:
        return {
            route: Loaded(
                draft.serving,
                self._errors[route][1] if route in self._errors else "",
                self._canaries.seen(route),
            )
            for route, draft in self._drafts.items()
        }

    def _run(self) -> None:
        stay_on_one_core()
        while not self._stopping:
            try:
                self.sync()
                self._canaries.follow()
                self.watch()
            except SlipstreamError as error:
                log.warning("versions can't be followed: %s", error)
            except Exception:
                log.exception("versions can't be followed")
            self._wake.wait(self._poll_s)
            self._wake.clear()

    # ── following the registry ──

    def sync(self) -> None:
        """Registers first drafts where there are none; swaps where another version is active than is loaded."""
        active = self._registry.active_versions()
        for route, draft in self._drafts.items():
            version = active.get(route) or self._register_first(draft)
            self._metrics.active_version.labels(route).set(version.id)
            if draft.generic is not None and is_generic(version):
                self._follow(draft, draft.generic)
                continue
            # A draft that failed while it served is loaded anew, but not twice a second.
            if draft.version == version.id and (draft.usable or draft.failed_within(RETRY_S)):
                self._errors.pop(route, None)
                draft.follows = False
            elif not self._failed_lately(route, version.id):
                self._swap(draft, version)
        if self._unannounced:
            self._registry.set_teaching(self._unannounced)
            self._unannounced = {}

    def _register_first(self, draft: LiveDraft) -> Version:
        self._registry.ensure_routes((draft.route,))
        if draft.generic is None:
            return self._registry.register_first(draft.route, self._first_draft(), "decoder")
        stood_for = self._registry.active(draft.generic.route)
        assert stood_for is not None, "the default route comes before its clusters"
        generic = Candidate(stood_for.sha256, {"origin": GENERIC}, {}, {}, stood_for.git_commit)
        return self._registry.register_first(draft.route, generic, "decoder", stood_for.id)

    def _follow(self, draft: LiveDraft, generic: LiveDraft) -> None:
        """The cluster has no draft of its own: nothing is loaded, its sequences are the generic draft's."""
        draft.follow(generic)
        self._errors.pop(draft.route, None)
        if self._followed.get(draft.route) == generic.version:
            return
        self._followed[draft.route] = generic.version
        self._guard.started(draft.route, generic.version, watched=False)
        self._metrics.loaded_version.labels(draft.route).set(generic.version)

    def _failed_lately(self, route: str, version: int) -> bool:
        failed = self._errors.get(route)
        return failed is not None and failed[0] == version and time.monotonic() < failed[2]

    def _swap(self, draft: LiveDraft, version: Version) -> None:
        try:
            pause_s = self._installer.load(draft, version)
        except ArtifactError as error:
            self._errors[draft.route] = (version.id, error.message, time.monotonic() + RETRY_S)
            self._metrics.swaps.labels(draft.route, "refused").inc()
            log.error("route %s stays on version %d: %s", draft.route, draft.version, error)
            return
        self._errors.pop(draft.route, None)
        self._followed.pop(draft.route, None)
        newest = self._registry.activations(draft.route, limit=1)[0]
        self._guard.started(draft.route, version.id, watched=newest.kind in ("promotion", "manual"))
        self._metrics.swaps.labels(draft.route, "done").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.loaded_version.labels(draft.route).set(version.id)
        log.info(
            "route %s now drafts with version %d (pause %.1f ms)",
            draft.route,
            version.id,
            pause_s * 1000,
        )

    # ── watching what is live ──

    def watch(self) -> None:
        """Shows finished requests to the guard and the canaries' tests, and does what they find."""
        while True:
            try:
                route, stats, arrived_s = self._finished.get_nowait()
            except queue.Empty:
                break
            if len(stats.versions) != 1:
                continue  # A request that two versions served says nothing about either.
            version, rate = stats.versions[0][2], stats.acceptance_rate
            for name in self._concerned(route):
                self._canaries.observe(name, version, rate, arrived_s)
                if (
                    rate is not None
                    and (regression := self._guard.observe(name, version, rate)) is not None
                ):
                    self._roll_back(regression)
        if self._canaries.decide():
            self._wake.set()
        for route in self._drafts:
            if (live := self._guard.live(route)) is not None:
                self._metrics.acceptance.labels(route).set(live)

    def _concerned(self, route: str) -> list[str]:
        """A cluster's requests also tell of the generic draft, where that one served them."""
        draft = self._drafts.get(route)
        return [
            route,
            *([draft.generic.route] if draft is not None and draft.generic is not None else []),
        ]

    def _roll_back(self, found: Regression) -> None:
        if self._registry.route(found.route).frozen:
            self._registry.record("guard", "rollback:held", found.route, f"frozen; {found.reason}")
            return
        try:
            self._registry.rollback(
                found.route, "auto_rollback", "guard", found.reason, expected=found.version
            )
        except Conflict as error:
            log.info("no automatic rollback of route %s: %s", found.route, error)
        else:
            log.warning("route %s rolled back: %s", found.route, found.reason)
            self._wake.set()
