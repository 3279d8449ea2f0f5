"""A route's stored signals, read without claiming them. The service itself never does this."""

from typing import Any, cast

from online.buffer import Entry, SignalBuffer
from online.memory_buffer import MemoryBuffer
from online.redis_buffer import RedisBuffer, RouteKeys, entry


def stored(buffer: SignalBuffer, route: str, limit: int = 10**6) -> list[Entry]:
    """The newest `limit` entries of the route's stream, oldest first."""
    if isinstance(buffer, MemoryBuffer):
        return buffer.entries(route)[-limit:]
    assert isinstance(buffer, RedisBuffer)
    rows = buffer.client.xrevrange(RouteKeys.of(route).signals, count=limit)
    return [entry(row) for row in cast(list[Any], rows)][::-1]
