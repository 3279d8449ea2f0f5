"""The decoder as the REST API sees it: `online.messages.EngineClient` over the engine and what keeps its drafts."""

from decoder.engine.engine import Engine
from decoder.rollout.installer import Installer
from decoder.rollout.swapper import Swapper
from decoder.sequence.sequence import OnDelta
from online.messages import EngineStatus, Query


class DecoderService:
    def __init__(self, engine: Engine, swapper: Swapper, installer: Installer) -> None:
        self._engine, self._swapper, self._installer = engine, swapper, installer

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        self._engine.submit(query, on_delta)

    def cancel(self, query_id: str) -> None:
        self._engine.cancel(query_id)

    def nudge(self) -> None:
        self._swapper.nudge()

    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=self._engine.alive and not self._installer.target_changed,
            running=self._engine.running,
            waiting=self._engine.waiting,
            slots=self._engine.limits.slots,
            max_context=self._engine.limits.max_context,
            target_fingerprint=self._installer.target_fingerprint,
            loaded=self._swapper.loaded(),
        )
