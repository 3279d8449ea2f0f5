"""Load for an engine in this process: a steady number of queries in flight, and drafts swapped beneath them."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from decoder.engine.engine import Engine
from decoder.models.loading import ModelFiles
from lab import rig
from online.errors import SlipstreamError
from online.messages import Delta, Query, SpeculationStats

SILENCE_S = 60.0  # after so long without a delta, what is in flight counts as never answered
INSTALL_LIMIT_S = 60.0


@dataclass
class Stream:
    """One query's answer as it grows."""

    query: Query
    ids: list[int] = field(default_factory=list)
    deltas: int = 0
    reason: str = ""  # empty: it has not ended
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def take(self, delta: Delta) -> None:
        self.ids += delta.token_ids
        self.deltas += 1
        self.reason = delta.finish_reason or ""
        self.stats = delta.stats or self.stats


def keep_busy(
    engine: Engine,
    queries: Iterator[Query],
    at_once: int,
    seen: Callable[[Stream], None] = lambda stream: None,
) -> Iterator[Stream]:
    """Streams as they end; as one ends the next query is sent, `at_once` of them in flight.

    Those that never end come last and without a reason. `seen` is called after a query is sent and after every delta.
    """
    inbox: queue.SimpleQueue[tuple[Stream, Delta]] = queue.SimpleQueue()
    in_flight: dict[str, Stream] = {}

    def send() -> None:
        query = next(queries, None)
        if query is None:
            return
        stream = in_flight[query.id] = Stream(query)
        try:
            engine.submit(query, lambda delta: inbox.put((stream, delta)))
        except SlipstreamError as error:
            inbox.put((stream, Delta("", (), finish_reason="error", error=error.message)))
        seen(stream)

    for _ in range(at_once):
        send()
    while in_flight:
        try:
            stream, delta = inbox.get(timeout=SILENCE_S)
        except queue.Empty:
            break
        stream.take(delta)
        if stream.reason:
            del in_flight[stream.query.id]
            send()
        seen(stream)
        if stream.reason:
            yield stream
    yield from in_flight.values()


def draft_folders(files: ModelFiles, folder: Path) -> tuple[Path, Path]:
    """A draft that knows nothing and the pair's own, each as the one safetensors file that `LiveDraft.stage` reads."""
    own = folder / "own"
    AutoModelForCausalLM.from_pretrained(files.draft, dtype="auto").save_pretrained(
        own, max_shard_size="1TB"
    )
    return Path(rig.random_draft(files, folder / "random")), own


@dataclass(frozen=True)
class Swap:
    """When a swap staged its weights, and when the engine's thread was busy installing them."""

    staging_s: float
    began_s: float
    ended_s: float

    @property
    def pause_s(self) -> float:
        return self.ended_s - self.began_s


def swaps(engine: Engine, folders: Sequence[Path], due: Callable[[int], bool]) -> list[Swap]:
    """Swaps the folders in by turns, on a thread of its own that stays on one core.

    `due` is given the number of swaps made; it returns when the next one is due, and False after the last.
    """
    made: list[Swap] = []
    while due(len(made)):
        made.append(swap(engine, folders[len(made) % len(folders)], len(made) + 1))
    return made


def swap(engine: Engine, folder: Path, version: int) -> Swap:
    """As the installer does it: staged on this thread, installed by the engine between two steps."""
    draft, started = engine.batch.drafts[rig.ROUTE], time.perf_counter()
    staged = draft.stage(folder)

    def change() -> Swap:
        began = time.perf_counter()
        draft.install(staged, version)
        return Swap(started, began, time.perf_counter())

    return engine.between_steps(change).result(INSTALL_LIMIT_S)
