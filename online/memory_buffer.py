"""The signal buffer inside one process, for replays and tests."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from online.buffer import BufferLimits, Depth, Entry, id_order, oldest_ms, sample, young


@dataclass
class _Route:
    """One route's entries, oldest first."""

    records: dict[str, bytes] = field(default_factory=dict)
    acceptances: dict[str, float | None] = field(default_factory=dict)
    total_bytes: int = 0
    last_delivered: str = "0-0"
    pending: list[str] = field(default_factory=list)
    kept: dict[str, bytes] = field(default_factory=dict)

    def new(self) -> list[str]:
        """Ids that no cycle has claimed."""
        last = id_order(self.last_delivered)
        return [entry_id for entry_id in self.records if id_order(entry_id) > last]

    def drop(self, entry_id: str) -> None:
        self.total_bytes -= len(self.records.pop(entry_id))
        del self.acceptances[entry_id]


class MemoryBuffer:
    def __init__(self, limits: BufferLimits) -> None:
        self.limits = limits
        self._routes: defaultdict[str, _Route] = defaultdict(_Route)
        self._sequence = itertools.count()

    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        held = self._routes[route]
        known = acceptances or [None] * len(records)
        for record, acceptance in zip(records, known, strict=True):
            entry_id = f"{time.time_ns() // 1_000_000}-{next(self._sequence)}"
            held.records[entry_id] = record
            held.acceptances[entry_id] = acceptance
            held.total_bytes += len(record)
        self.trim(route)

    def trim(self, route: str) -> None:
        held, oldest = self._routes[route], oldest_ms(self.limits)
        held.kept = {entry.id: entry.record for entry in self.kept(route)}
        while held.records:
            head = next(iter(held.records))
            full = len(held.records) > self.limits.signals or held.total_bytes > self.limits.bytes
            if not full and id_order(head)[0] >= oldest:
                return
            held.drop(head)

    def depth(self, route: str) -> Depth:
        held = self._routes[route]
        return Depth(len(held.records), held.total_bytes)

    def entries(self, route: str) -> list[Entry]:
        """Every entry of the route's stream, oldest first."""
        return [Entry(*item) for item in list(self._routes[route].records.items())]

    def claim(self, route: str, limit: int) -> list[Entry]:
        held = self._routes[route]
        held.pending = [entry_id for entry_id in held.pending if entry_id in held.records]
        if not held.pending:
            held.pending = held.new()[:limit]
            held.last_delivered = max((held.last_delivered, *held.pending), key=id_order)
        return [Entry(entry_id, held.records[entry_id]) for entry_id in held.pending]

    def acknowledge(self, route: str, ids: Iterable[str]) -> None:
        done, held = set(ids), self._routes[route]
        held.pending = [entry_id for entry_id in held.pending if entry_id not in done]

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        held = self._routes[route]
        return [held.acceptances[entry_id] for entry_id in held.new()[:at_most]]

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        held = self._routes[route]
        pool = held.kept | {entry.id: entry.record for entry in entries}
        sizes = {entry_id: len(record) for entry_id, record in pool.items()}
        held.kept = {entry_id: pool[entry_id] for entry_id in sample(sizes, limit, self.limits)}

    def kept(self, route: str) -> list[Entry]:
        kept = self._routes[route].kept
        ids = sorted(young(kept, self.limits), key=id_order)
        return [Entry(entry_id, kept[entry_id]) for entry_id in ids]
