"""The services that a cycle works with, built once by the process that runs it."""

from dataclasses import dataclass

from online.artifacts import ArtifactStore
from online.buffer import SignalBuffer
from online.connections import signal_buffer
from online.cycles import CycleLedger
from online.database import connect
from online.registry import Registry
from online.settings import Settings
from trainer.weights import Weights


@dataclass(frozen=True, slots=True)
class CycleContext:
    settings: Settings
    registry: Registry
    ledger: CycleLedger
    buffer: SignalBuffer
    artifacts: ArtifactStore

    @classmethod
    def of(cls, settings: Settings) -> "CycleContext":
        database = connect(settings.sql_url)
        return cls(
            settings,
            Registry(database),
            CycleLedger(database),
            signal_buffer(settings),
            ArtifactStore(settings.artifacts_path),
        )

    @property
    def weights(self) -> Weights:
        return Weights(self.settings, self.registry, self.artifacts)
