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
