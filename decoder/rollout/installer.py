"""Installs a draft version: verify and stage it, copy it in between two steps, check the target."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from decoder.rollout.live import LiveDraft
from online.artifacts import ArtifactStore
from online.errors import ArtifactError
from online.tables import Version

log = logging.getLogger("slipstream.install")

INSTALL_LIMIT_S = 60.0  # an engine that takes longer to reach the swap counts as hanging
BetweenSteps = Callable[[Callable[[], float]], Future[float]]


class Installer:
    def __init__(
        self,
        between_steps: BetweenSteps,
        artifacts: ArtifactStore,
        target_fingerprint: Callable[[], str],
    ) -> None:
        """`between_steps` is `Engine.between_steps`."""
        self._between_steps = between_steps
        self._artifacts = artifacts
        self._fingerprint_now = target_fingerprint
        self.target_fingerprint = target_fingerprint()  # as loaded; no swap may change it
        self.target_changed = False

    def load(self, draft: LiveDraft, version: Version) -> float:
        """Makes `draft` run `version` from the next step on. Returns the engine's pause in seconds.

        Raises:
            ArtifactError: the weights are damaged or do not fit; the draft keeps its old ones.
        """
        staged = draft.stage(self._artifacts.verify(version.sha256))
        pause_s = self._install(draft, staged, version.id)
        self._check_target(version)
        return pause_s

    def _install(self, draft: LiveDraft, staged: Any, version: int) -> float:
        def change() -> float:
            started = time.perf_counter()
            draft.install(staged, version)
            return time.perf_counter() - started

        done = self._between_steps(change)
        try:
            return done.result(INSTALL_LIMIT_S)
        except (TimeoutError, CancelledError):
            done.cancel()
            raise ArtifactError("the engine did not reach the swap") from None

    def _check_target(self, version: Version) -> None:
        """A draft copied over the target's weights would change outputs without any error."""
        if self._fingerprint_now() == self.target_fingerprint:
            return
        self.target_changed = True
        log.critical(
            "The target's weights changed with the swap to version %d. This decoder is unhealthy.",
            version.id,
        )


class LoadFailures:
    """The last failed load of every route, until another one succeeds."""

    def __init__(self, retry_s: float) -> None:
        """A version that failed is blocked for `retry_s`."""
        self._retry_s = retry_s
        self._failed: dict[str, tuple[int, str, float]] = {}  # version, message, end of the block

    def add(self, route: str, version: int, message: str) -> None:
        self._failed[route] = version, message, time.monotonic() + self._retry_s

    def clear(self, route: str) -> None:
        self._failed.pop(route, None)

    def message(self, route: str) -> str:
        """Why the route does not run its active version; empty if it does."""
        return self._failed[route][1] if route in self._failed else ""

    def block(self, route: str, version: int) -> bool:
        failed = self._failed.get(route)
        return failed is not None and failed[0] == version and time.monotonic() < failed[2]
