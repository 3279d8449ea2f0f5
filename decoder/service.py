"""The decoder as the REST API sees it: `online.messages.EngineClient` over engine and swapper."""

from decoder.engine import Engine
from decoder.rows import OnDelta
from decoder.swap import Swapper
from online.messages import EngineStatus, Query


class DecoderService:
    def __init__(self, engine: Engine, swapper: Swapper) -> None:
        self._engine, self._swapper = engine, swapper

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        self._engine.submit(query, on_delta)

    def cancel(self, query_id: str) -> None:
        self._engine.cancel(query_id)

    def nudge(self) -> None:
        self._swapper.nudge()

    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=self._engine.alive and not self._swapper.target_changed,
            running=self._engine.running,
            waiting=self._engine.waiting,
            slots=self._engine.limits.slots,
            max_context=self._engine.limits.max_context,
            target_fingerprint=self._swapper.target_fingerprint,
            loaded=self._swapper.loaded(),
        )
