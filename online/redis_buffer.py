"""The signal buffer in Redis: one stream per route.

All keys (the braces keep a route's keys on one node of a cluster):

    slipstream:{ROUTE}:signals   stream; one entry per request, field `s`: its record.
                                 Consumer group `trainer`
    slipstream:{ROUTE}:index     stream; the same entry ids, field `a`: the request's
                                 acceptance rate, empty if unknown
    slipstream:{ROUTE}:bytes     integer; bytes of all records in the stream
    slipstream:{ROUTE}:kept      hash; entry id → record: a sample of all acknowledged
                                 entries, within retention and half the stream's bytes

Acknowledged entries stay until the limits push them out, oldest first. Later cycles replay the
kept sample: the newest earlier entries would all be of yesterday, and the draft would forget the
traffic of last week.

The trainer's clock reads the index every few seconds: records are hundreds of times as large.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis

from online.buffer import BufferLimits, Depth, Entry, id_order, sample, young

GROUP = "trainer"
# All workers use one name. A route has one cycle at a time, so the entries that are pending under
# this name are exactly the window of an interrupted cycle.
CONSUMER = "cycle"
BATCH = 200  # records per command: the server answers others in between

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
class RouteKeys:
    """The Redis keys of one route."""

    signals: str
    total_bytes: str
    index: str
    kept: str

    @classmethod
    def of(cls, route: str) -> "RouteKeys":
        prefix = f"slipstream:{{{route}}}"
        return cls(f"{prefix}:signals", f"{prefix}:bytes", f"{prefix}:index", f"{prefix}:kept")


class RedisBuffer:
    def __init__(self, client: "redis.Redis", limits: BufferLimits) -> None:
        self.client = client
        self._limits = limits
        self._append = client.register_script(_APPEND)

    # ── writing ──

    def append(self, route: str, *records: bytes, acceptances: Sequence[float | None] = ()) -> None:
        limits, keys = self._limits, RouteKeys.of(route)
        args: list[Any] = [limits.signals, limits.bytes, limits.retention_s * 1000]
        known = acceptances or [None] * len(records)
        for record, acceptance in zip(records, known, strict=True):
            args += [record, "" if acceptance is None else repr(acceptance)]
        self._append(keys=[keys.signals, keys.total_bytes, keys.index], args=args)

    def trim(self, route: str) -> None:
        self.append(route)
        kept = self._kept_ids(route)
        if expired := set(kept) - set(young(kept, self._limits)):
            self.client.hdel(RouteKeys.of(route).kept, *expired)

    def depth(self, route: str) -> Depth:
        keys = RouteKeys.of(route)
        total = cast(bytes, self.client.get(keys.total_bytes)) or 0
        return Depth(self.client.xlen(keys.signals), int(total))

    # ── cycles ──

    def claim(self, route: str, limit: int) -> list[Entry]:
        self._ensure_group(route)
        pending = self._read_group(route, "0", None)
        # A pending entry without a record was trimmed: nothing is left to train on.
        self.acknowledge(route, [entry.id for entry in pending if not entry.record])
        window = [entry for entry in pending if entry.record]
        return window or self._read_group(route, ">", limit)

    def acknowledge(self, route: str, ids: Iterable[str]) -> None:
        for batch in _batches(list(ids)):
            self.client.xack(RouteKeys.of(route).signals, GROUP, *batch)

    def unclaimed(self, route: str, at_most: int) -> list[float | None]:
        first = f"({self._last_delivered(route)}"
        index = RouteKeys.of(route).index
        rows = cast(list[Any], self.client.xrange(index, min=first, max="+", count=at_most))
        return [float(fields[b"a"]) if fields[b"a"] else None for _, fields in rows]

    def _ensure_group(self, route: str) -> None:
        try:
            self.client.xgroup_create(RouteKeys.of(route).signals, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _read_group(self, route: str, after: str, limit: int | None) -> list[Entry]:
        stream = RouteKeys.of(route).signals
        found = self.client.xreadgroup(GROUP, CONSUMER, {stream: after}, count=limit)
        return [entry(row) for row in cast(list[Any], found)[0][1]] if found else []

    def _last_delivered(self, route: str) -> str:
        stream = RouteKeys.of(route).signals
        if not self.client.exists(stream):
            return "0-0"
        for group in self.client.xinfo_groups(stream):
            if _text(group["name"]) == GROUP:
                return _text(group["last-delivered-id"])
        return "0-0"

    # ── kept sample ──

    def keep(self, route: str, entries: Iterable[Entry], limit: int) -> None:
        key = RouteKeys.of(route).kept
        offered = {entry.id: entry.record for entry in entries}
        known = self._kept_sizes(route)
        sizes = known | {entry_id: len(record) for entry_id, record in offered.items()}
        chosen = sample(sizes, limit, self._limits)
        # Delete first: there may not be enough memory for both.
        if dropped := known.keys() - chosen:
            self.client.hdel(key, *dropped)
        for batch in _batches(sorted(chosen - known.keys())):
            self.client.hset(key, mapping={entry_id: offered[entry_id] for entry_id in batch})

    def kept(self, route: str) -> list[Entry]:
        key = RouteKeys.of(route).kept
        found: list[Entry] = []
        for batch in _batches(sorted(young(self._kept_ids(route), self._limits), key=id_order)):
            records = cast(list[bytes | None], self.client.hmget(key, batch))
            pairs = zip(batch, records, strict=True)
            found += [Entry(entry_id, record) for entry_id, record in pairs if record]
        return found

    def _kept_ids(self, route: str) -> list[str]:
        ids = cast(list[bytes], self.client.hkeys(RouteKeys.of(route).kept))
        return [_text(entry_id) for entry_id in ids]

    def _kept_sizes(self, route: str) -> dict[str, int]:
        ids = self._kept_ids(route)
        with self.client.pipeline(transaction=False) as pipe:
            for entry_id in ids:
                pipe.hstrlen(RouteKeys.of(route).kept, entry_id)
            return dict(zip(ids, pipe.execute(), strict=True))


def entry(row: tuple[bytes, dict[bytes, bytes] | None]) -> Entry:
    """The entry of a stream's row. A trimmed row has no fields and becomes an empty record."""
    entry_id, fields = row
    return Entry(_text(entry_id), (fields or {}).get(b"s", b""))


def _batches(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
