"""The decoder as the REST API sees it: `online.messages.EngineClient` over engine and swapper."""

from decoder.engine.engine import Engine
from decoder.rollout.swapper import Swapper
from decoder.sequence.sequence import OnDelta
from online.messages import EngineStatus, Query


class DecoderService:
    def __init__(self, engine: Engine, swapper: Swapper) -> None:
        self._engine = engine
        self._swapper = swapper

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        self._engine.submit(query, on_delta)

    def cancel(self, query_id: str) -> None:
        self._engine.cancel(query_id)

    def nudge(self) -> None:
        self._swapper.nudge()

    def status(self) -> EngineStatus:
        engine = self._engine
        installer = self._swapper.installer
        return EngineStatus(
            alive=engine.alive and not installer.target_changed,
            running=engine.running,
            waiting=engine.waiting,
            slots=engine.limits.slots,
            max_context=engine.limits.max_context,
            target_fingerprint=installer.target_fingerprint,
            loaded=self._swapper.loaded(),
        )
