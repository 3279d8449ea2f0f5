"""The swapper: follows the registry's active versions, stages weights aside and has the engine copy them in.

It polls the database, and the admin API of the same process wakes it: a rollback therefore needs neither Redis nor the
trainer. When the database is away, the drafts that are loaded go on serving.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from decoder.device import stay_on_one_core
from decoder.drafts import LiveDraft
from online.artifacts import ArtifactStore
from online.errors import ArtifactError, Conflict, SlipstreamError
from online.messages import Loaded, SpeculationStats
from online.metrics import ServiceMetrics
from online.registry import Candidate, Registry
from online.rollout import Regression, RolloutGuard
from online.tables import Version

log = logging.getLogger("slipstream.swap")

RETRY_S = 10.0  # a version that could not be loaded, or failed, is tried again after this long
INSTALL_LIMIT_S = 60.0  # a step that takes longer than this has failed anyway


class Swapper:
    def __init__(
        self,
        drafts: Mapping[str, LiveDraft],
        between_steps: Callable[[Callable[[], None]], None],
        registry: Registry,
        artifacts: ArtifactStore,
        first_draft: Callable[[Path], None],
        git_commit: str,
        target_fingerprint: Callable[[], str],
        guard: RolloutGuard,
        metrics: ServiceMetrics,
        poll_s: float,
    ) -> None:
        self._drafts, self._between_steps = drafts, between_steps
        self._registry, self._artifacts = registry, artifacts
        self._first_draft, self._git_commit = first_draft, git_commit
        self._target_fingerprint = target_fingerprint
        self.target_fingerprint = target_fingerprint()  # as loaded; no swap may ever change it
        self.target_changed = False
        self._guard, self._metrics, self._poll_s = guard, metrics, poll_s
        self._finished: queue.SimpleQueue[tuple[str, SpeculationStats]] = queue.SimpleQueue()
        self._errors: dict[str, tuple[int, str, float]] = {}  # route → version, why, when to try again
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

    def finished(self, route: str, stats: SpeculationStats) -> None:
        """A request ended: called on the engine's thread, so it only leaves a note."""
        self._finished.put((route, stats))

    def loaded(self) -> dict[str, Loaded]:
        return {
            route: Loaded(draft.version, self._errors[route][1] if route in self._errors else "")
            for route, draft in self._drafts.items()
        }

    def _run(self) -> None:
        stay_on_one_core()
        while not self._stopping:
            try:
                self.sync()
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
            version = active.get(route) or self._register_first(route)
            self._metrics.active_version.labels(route).set(version.id)
            # A draft that failed while it served is loaded anew, but not twice a second.
            if draft.version == version.id and (draft.usable or draft.failed_within(RETRY_S)):
                self._errors.pop(route, None)
            elif not self._failed_lately(route, version.id):
                self._swap(draft, version)

    def _register_first(self, route: str) -> Version:
        self._registry.ensure_routes((route,))
        digest = self._artifacts.publish(self._first_draft)
        first = Candidate(digest, {"origin": "first draft"}, {}, {}, self._git_commit)
        return self._registry.register_first(route, first, "decoder")

    def _failed_lately(self, route: str, version: int) -> bool:
        failed = self._errors.get(route)
        return failed is not None and failed[0] == version and time.monotonic() < failed[2]

    def _swap(self, draft: LiveDraft, version: Version) -> None:
        try:
            staged = draft.stage(self._artifacts.verify(version.sha256))
            pause_s = self._install(lambda: draft.install(staged, version.id))
        except ArtifactError as error:
            self._errors[draft.route] = (version.id, error.message, time.monotonic() + RETRY_S)
            self._metrics.swaps.labels(draft.route, "refused").inc()
            log.error("route %s stays on version %d: %s", draft.route, draft.version, error)
            return
        self._errors.pop(draft.route, None)
        self._check_target(version)
        newest = self._registry.activations(draft.route, limit=1)[0]
        self._guard.started(draft.route, version.id, watched=newest.kind in ("promotion", "manual"))
        self._metrics.swaps.labels(draft.route, "done").inc()
        self._metrics.swap_pause.observe(pause_s)
        self._metrics.loaded_version.labels(draft.route).set(version.id)
        log.info("route %s now drafts with version %d (pause %.1f ms)", draft.route, version.id, pause_s * 1000)

    def _check_target(self, version: Version) -> None:
        """A draft published into the target has happened to others: outputs go wrong and nothing fails."""
        if self._target_fingerprint() != self.target_fingerprint:
            self.target_changed = True
            log.critical(
                "the target's weights changed with the swap to version %d: this decoder is unhealthy", version.id
            )

    def _install(self, install: Callable[[], None]) -> float:
        """Has the engine's thread run `install` between two steps; returns how long that took."""
        outcome: queue.SimpleQueue[float | Exception] = queue.SimpleQueue()

        def change() -> None:
            started = time.perf_counter()
            try:
                install()
            except Exception as error:
                outcome.put(error)
            else:
                outcome.put(time.perf_counter() - started)

        self._between_steps(change)
        try:
            result = outcome.get(timeout=INSTALL_LIMIT_S)
        except queue.Empty:
            raise ArtifactError("the engine did not come to the swap") from None
        if isinstance(result, Exception):
            raise result
        return result

    # ── watching what is live ──

    def watch(self) -> None:
        """Shows finished requests to the guard, and rolls back where it finds a regression."""
        while True:
            try:
                route, stats = self._finished.get_nowait()
            except queue.Empty:
                break
            rate = stats.acceptance_rate
            # A request that two versions served says nothing about either.
            if rate is not None and len(stats.versions) == 1:
                regression = self._guard.observe(route, stats.versions[0][2], rate)
                if regression is not None:
                    self._roll_back(regression)
        for route in self._drafts:
            if (live := self._guard.live(route)) is not None:
                self._metrics.acceptance.labels(route).set(live)

    def _roll_back(self, found: Regression) -> None:
        if self._registry.route(found.route).frozen:
            self._registry.record("guard", "rollback:held", found.route, f"frozen; {found.reason}")
            return
        try:
            self._registry.rollback(found.route, "auto_rollback", "guard", found.reason, expected=found.version)
        except Conflict as error:
            log.info("no automatic rollback of route %s: %s", found.route, error)
        else:
            log.warning("route %s rolled back: %s", found.route, found.reason)
            self._wake.set()
