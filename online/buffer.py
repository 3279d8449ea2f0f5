"""The signal buffer: one Redis Stream per route, bounded in count, bytes and age.

Keys, all of them (the braces keep a route's keys on one node of a cluster):

    slipstream:{ROUTE}:signals   stream; one entry per request, field `s`; consumer group `trainer`
    slipstream:{ROUTE}:index     stream; the same entry ids, field `a`: the request's acceptance, empty where unknown
    slipstream:{ROUTE}:bytes     integer; bytes of all records in the stream
    slipstream:{ROUTE}:kept      hash; entry id → record: a sample of all that was ever acknowledged, within retention
                                 and half the bytes that the stream may have

Acknowledged entries stay until the bounds push them out, oldest first. What a later cycle replays is the kept sample:
the newest of what is older would be the traffic of yesterday, and a draft would forget that of last week.

The index is what the trainer's clock reads every few seconds: records are hundreds of times as large.
"""

import hashlib
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import redis

GROUP = "trainer"
# One name for every worker: a cycle is single-flight per route, so what is pending under this name is exactly the
# window that an interrupted cycle left behind.
CONSUMER = "cycle"
AT_ONCE = 200  # records of one command: the server serves others in between
LATEST = "99999999999999-0"  # an entry id behind every real one

_APPEND = """
local function trim(total)
  local oldest_ms = redis.call('TIME')[1] * 1000 - ARGV[3]
  while true do
    local head = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
    if not head then return end
    local over = total > tonumber(ARGV[2]) or redis.call('XLEN', KEYS[1]) > tonumber(ARGV[1])
    if not over and tonumber(string.match(head[1], '^%d+')) >= oldest_ms then return end
    redis.call('XDEL', KEYS[1], head[1])
    redis.call('XDEL', KEYS[3], head[1])
    total = redis.call('DECRBY', KEYS[2], #head[2][2])
  end
end
for i = 4, #ARGV, 2 do
  local id = redis.call('XADD', KEYS[1], '*', 's', ARGV[i])
  redis.call('XADD', KEYS[3], id, 'a', ARGV[i + 1])
  redis.call('INCRBY', KEYS[2], #ARGV[i])
end
trim(tonumber(redis.call('GET', KEYS[2]) or '0'))
"""


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
        """Of the kept sample, beside the stream."""
        return self.bytes // 2


def id_order(entry_id: str) -> tuple[int, int]:
    """Entry ids compare as two numbers, not as text."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class SignalBuffer(Protocol):
    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        """Adds records in one go, and trims the route to its bounds, oldest first.

        `acceptances`: of each record's request; empty where none is known.
        """

    def claim(self, route: str, limit: int) -> list[Entry]:
        """The window of the next cycle: what an interrupted cycle left pending, else up to `limit` new entries."""

    def acknowledge(self, route: str, ids: Iterable[str]) -> None: ...

    def before(self, route: str, entry_id: str, limit: int) -> list[Entry]:
        """Up to `limit` entries older than `entry_id`, newest first."""

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        """Offers entries to the kept sample: `limit` of all that were ever offered, each as likely as any other.

        Fewer where they would be too many bytes. Offering an entry twice is offering it once.
        """

    def kept(self, route: str) -> list[Entry]:
        """The kept sample, oldest first."""

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        """Acceptances of the first `at_most` entries that no cycle has claimed yet, oldest first."""

    def trim(self, route: str) -> None: ...

    def depth(self, route: str) -> Depth: ...


class RedisBuffer:
    def __init__(self, client: "redis.Redis", bounds: BufferLimits) -> None:
        self._redis = client
        self._limits = bounds
        self._append = client.register_script(_APPEND)

    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        told = [
            "" if acceptance is None else repr(acceptance)
            for acceptance in acceptances or [None] * len(records)
        ]
        pairs = [part for pair in zip(records, told, strict=True) for part in pair]
        limits = self._limits
        args = [limits.signals, limits.bytes, limits.retention_s * 1000, *pairs]
        self._append(keys=_keys(route), args=args)

    def trim(self, route: str) -> None:
        self.append(route)
        names = self._kept_names(route)
        if old := set(names) - set(_young(names, self._limits)):
            self._redis.hdel(_kept_key(route), *old)

    def claim(self, route: str, limit: int) -> list[Entry]:
        self._ensure_group(route)
        pending = self._read_group(route, "0", None)
        # A pending entry whose record is gone was trimmed: nothing is left to train on.
        self.acknowledge(route, [entry.id for entry in pending if not entry.record])
        window = [entry for entry in pending if entry.record]
        return window or self._read_group(route, ">", limit)

    def acknowledge(self, route: str, ids: Iterable[str]) -> None:
        ids = list(ids)
        for at in range(0, len(ids), 500):
            self._redis.xack(_keys(route)[0], GROUP, *ids[at : at + 500])

    def before(self, route: str, entry_id: str, limit: int) -> list[Entry]:
        if limit <= 0:
            return []
        rows = self._redis.xrevrange(_keys(route)[0], max=f"({entry_id}", min="-", count=limit)
        return [_entry(row) for row in cast(list[Any], rows)]

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        offered = {entry.id: entry.record for entry in entries}
        names = self._kept_names(route)
        with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hstrlen(_kept_key(route), name)
            known = dict(zip(names, pipe.execute(), strict=True))
        chosen = _sample(
            known | {name: len(record) for name, record in offered.items()}, limit, self._limits
        )
        if gone := known.keys() - chosen:  # first: there may be no room for both
            self._redis.hdel(_kept_key(route), *gone)
        new = sorted(chosen - known.keys())
        for at in range(0, len(new), AT_ONCE):
            self._redis.hset(
                _kept_key(route), mapping={name: offered[name] for name in new[at : at + AT_ONCE]}
            )

    def kept(self, route: str) -> list[Entry]:
        names = sorted(_young(self._kept_names(route), self._limits), key=id_order)
        found: list[Entry] = []
        for at in range(0, len(names), AT_ONCE):
            some = names[at : at + AT_ONCE]
            records = cast(list[bytes | None], self._redis.hmget(_kept_key(route), some))
            found += [
                Entry(name, record) for name, record in zip(some, records, strict=True) if record
            ]
        return found

    def _kept_names(self, route: str) -> list[str]:
        return [_text(name) for name in cast(list[bytes], self._redis.hkeys(_kept_key(route)))]

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        last = "0-0"
        if self._redis.exists(_keys(route)[0]):
            for group in self._redis.xinfo_groups(_keys(route)[0]):
                if _text(group["name"]) == GROUP:
                    last = _text(group["last-delivered-id"])
        rows = self._redis.xrange(_keys(route)[2], min=f"({last}", max="+", count=at_most)
        return [
            float(fields[b"a"]) if fields[b"a"] else None for _, fields in cast(list[Any], rows)
        ]

    def depth(self, route: str) -> Depth:
        stream, counter, _ = _keys(route)
        return Depth(self._redis.xlen(stream), int(cast(bytes, self._redis.get(counter)) or 0))

    def _ensure_group(self, route: str) -> None:
        try:
            self._redis.xgroup_create(_keys(route)[0], GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _read_group(self, route: str, after: str, limit: int | None) -> list[Entry]:
        stream = _keys(route)[0]
        found = self._redis.xreadgroup(GROUP, CONSUMER, {stream: after}, count=limit)
        return [_entry(row) for row in cast(list[Any], found)[0][1]] if found else []


def _keys(route: str) -> list[str]:
    return [f"slipstream:{{{route}}}:{what}" for what in ("signals", "bytes", "index")]


def _kept_key(route: str) -> str:
    return f"slipstream:{{{route}}}:kept"


def _young(ids: Iterable[str], bounds: BufferLimits) -> list[str]:
    oldest_ms = time.time_ns() // 1_000_000 - bounds.retention_s * 1000
    return [name for name in ids if id_order(name)[0] >= oldest_ms]


def _sample(sizes: Mapping[str, int], limit: int, bounds: BufferLimits) -> set[str]:
    """Those whose hashes are smallest: a uniform sample that needs to know neither what came before nor how much."""
    order = sorted(_young(sizes, bounds), key=lambda name: hashlib.sha256(name.encode()).digest())[
        :limit
    ]
    used = itertools.accumulate(sizes[name] for name in order)
    return {name for name, total in zip(order, used, strict=True) if total <= bounds.kept_bytes}


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _entry(row: tuple[bytes, dict[bytes, bytes] | None]) -> Entry:
    entry_id, fields = row
    return Entry(_text(entry_id), (fields or {}).get(b"s", b""))


@dataclass
class MemoryBuffer:
    """The same buffer inside one process, for replays and tests. Passes the contract tests of `RedisBuffer`."""

    bounds: BufferLimits
    _entries: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _acceptances: dict[str, dict[str, float | None]] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)
    _delivered: dict[str, str] = field(default_factory=dict)
    _pending: dict[str, dict[str, None]] = field(default_factory=dict)
    _kept: dict[str, dict[str, bytes]] = field(default_factory=dict)
    _sequence: "itertools.count[int]" = field(default_factory=itertools.count)

    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        for record, acceptance in zip(records, acceptances or [None] * len(records), strict=True):
            entry_id = f"{time.time_ns() // 1_000_000}-{next(self._sequence)}"
            self._entries.setdefault(route, {})[entry_id] = record
            self._acceptances.setdefault(route, {})[entry_id] = acceptance
            self._bytes[route] = self._bytes.get(route, 0) + len(record)
        self.trim(route)

    def trim(self, route: str) -> None:
        self._kept[route] = {entry.id: entry.record for entry in self.kept(route)}
        entries = self._entries.get(route, {})
        oldest_ms = time.time_ns() // 1_000_000 - self.bounds.retention_s * 1000
        while entries:
            depth, head = self.depth(route), next(iter(entries))
            over = depth.signals > self.bounds.signals or depth.bytes > self.bounds.bytes
            if not over and id_order(head)[0] >= oldest_ms:
                return
            del self._acceptances[route][head]
            self._bytes[route] -= len(entries.pop(head))

    def claim(self, route: str, limit: int) -> list[Entry]:
        entries, pending = self._entries.get(route, {}), self._pending.setdefault(route, {})
        for entry_id in [i for i in pending if i not in entries]:
            del pending[entry_id]
        if not pending:
            for entry in self._new(route)[:limit]:
                pending[entry.id] = None
                self._delivered[route] = entry.id
        return [Entry(entry_id, entries[entry_id]) for entry_id in pending]

    def acknowledge(self, route: str, ids: Iterable[str]) -> None:
        for entry_id in ids:
            self._pending.get(route, {}).pop(entry_id, None)

    def before(self, route: str, entry_id: str, limit: int) -> list[Entry]:
        older = [
            Entry(i, r)
            for i, r in self._entries.get(route, {}).items()
            if id_order(i) < id_order(entry_id)
        ]
        return older[::-1][: max(0, limit)]

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        pool = self._kept.get(route, {}) | {entry.id: entry.record for entry in entries}
        chosen = _sample({name: len(record) for name, record in pool.items()}, limit, self.bounds)
        self._kept[route] = {name: pool[name] for name in chosen}

    def kept(self, route: str) -> list[Entry]:
        entries = self._kept.get(route, {})
        return [
            Entry(name, entries[name])
            for name in sorted(_young(entries, self.bounds), key=id_order)
        ]

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        return [self._acceptances[route][entry.id] for entry in self._new(route)[:at_most]]

    def depth(self, route: str) -> Depth:
        entries = self._entries.get(route, {})
        return Depth(len(entries), self._bytes.get(route, 0))

    def _new(self, route: str) -> list[Entry]:
        last = id_order(self._delivered.get(route, "0-0"))
        return [Entry(i, r) for i, r in self._entries.get(route, {}).items() if id_order(i) > last]
