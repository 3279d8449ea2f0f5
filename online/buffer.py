"""The signal buffer: a bounded stream of signals per route, and a kept sample of earlier ones.

Bounds are a number of signals, bytes and an age. `RedisBuffer` serves processes; `MemoryBuffer`
serves replays and tests inside one process. Both pass the same contract tests.
"""

import hashlib
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    id: str  # "milliseconds-sequence", ascending within a route
    record: bytes


@dataclass(frozen=True, slots=True)
class Depth:
    signals: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BufferLimits:
    signals: int
    bytes: int
    retention_s: int

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept sample, beside the stream."""
        return self.bytes // 2


class SignalBuffer(Protocol):
    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        """Appends records in one call, then trims the route to its limits.

        `acceptances`: acceptance rate of each record's request; empty if none is known.
        """

    def trim(self, route: str) -> None:
        """Deletes what exceeds the limits, oldest first, and what has outlived its retention."""

    def depth(self, route: str) -> Depth: ...

    def claim(self, route: str, limit: int) -> list[Entry]:
        """The window of the next cycle.

        That is the window of an interrupted cycle, or else up to `limit` new entries.
        """

    def acknowledge(self, route: str, ids: Iterable[str]) -> None:
        """Marks entries as used. They stay until the limits push them out."""

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        """Acceptance rates of the first `at_most` entries that no cycle has claimed."""

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        """Offers entries to the kept sample.

        The sample is uniform over all entries ever offered: at most `limit` of them, fewer if
        they have too many bytes. Offering an entry twice changes nothing.
        """

    def kept(self, route: str) -> list[Entry]:
        """The kept sample, oldest first."""


def id_order(entry_id: str) -> tuple[int, int]:
    """Sort key of entry ids: they compare as two numbers, not as text."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def oldest_ms(limits: BufferLimits) -> int:
    """Time in milliseconds before which an entry has outlived its retention."""
    return time.time_ns() // 1_000_000 - limits.retention_s * 1000


def young(ids: Iterable[str], limits: BufferLimits) -> list[str]:
    """The ids that are within retention."""
    oldest = oldest_ms(limits)
    return [entry_id for entry_id in ids if id_order(entry_id)[0] >= oldest]


def sample(sizes: Mapping[str, int], limit: int, limits: BufferLimits) -> set[str]:
    """At most `limit` ids, within retention and bytes. `sizes`: bytes of each entry.

    Takes the ids with the smallest hashes. That is a uniform sample, and it stays one without
    a count of the entries that came before.
    """
    order = sorted(young(sizes, limits), key=_digest)[:limit]
    used = itertools.accumulate(sizes[entry_id] for entry_id in order)
    pairs = zip(order, used, strict=True)
    return {entry_id for entry_id, total in pairs if total <= limits.kept_bytes}


def _digest(entry_id: str) -> bytes:
    return hashlib.sha256(entry_id.encode()).digest()
