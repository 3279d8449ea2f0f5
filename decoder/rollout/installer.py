"""Puts a version into a draft: checked and staged aside, copied in between two steps, the target compared after it."""

import logging
import queue
import time
from collections.abc import Callable

from decoder.rollout.live import LiveDraft
from online.artifacts import ArtifactStore
from online.errors import ArtifactError
from online.tables import Version

log = logging.getLogger("slipstream.install")

INSTALL_LIMIT_S = 60.0  # a step that takes longer than this has failed anyway


class Installer:
    def __init__(
        self,
        between_steps: Callable[[Callable[[], None]], None],
        artifacts: ArtifactStore,
        target_fingerprint: Callable[[], str],
    ) -> None:
        self._between_steps, self._artifacts = between_steps, artifacts
        self._target_fingerprint = target_fingerprint
        self.target_fingerprint = target_fingerprint()  # as loaded; no swap may ever change it
        self.target_changed = False

    def load(self, draft: LiveDraft, version: Version) -> float:
        """Has `draft` run `version` from the next step on; returns how long the engine paused for it.

        Raises:
            ArtifactError: damaged weights, or ones that this draft can't take. It goes on with those that it has.
        """
        staged = draft.stage(self._artifacts.verify(version.sha256))
        pause_s = self._install(lambda: draft.install(staged, version.id))
        self._check_target(version)
        return pause_s

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

    def _check_target(self, version: Version) -> None:
        """A draft published into the target has happened to others: outputs go wrong and nothing fails."""
        if self._target_fingerprint() != self.target_fingerprint:
            self.target_changed = True
            log.critical(
                "the target's weights changed with the swap to version %d: this decoder is unhealthy",
                version.id,
            )
