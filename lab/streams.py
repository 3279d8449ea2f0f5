"""Load for an engine in this process, and the streams of answers that come back."""

import math
import queue
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from decoder.engine.engine import Engine
from online.errors import SlipstreamError
from online.messages import Delta, Query, SpeculationStats

SILENCE_S = 60.0  # after so long without a delta, what is in flight counts as never answered


@dataclass(eq=False)
class Stream:
    """One query and its answer so far."""

    query: Query
    ids: list[int] = field(default_factory=list)
    deltas: int = 0
    reason: str = ""  # empty: it has not ended
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    sent_s: float = field(default_factory=time.perf_counter)
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # s since sent, tokens
    error: str = ""

    def take(self, delta: Delta, now: float) -> None:
        """Adds a delta."""
        if delta.token_ids:
            self.arrivals.append((now - self.sent_s, len(delta.token_ids)))
        self.ids += delta.token_ids
        self.deltas += 1
        self.reason = delta.finish_reason or ""
        self.stats = delta.stats or self.stats
        self.error = delta.error

    @property
    def first_s(self) -> float:
        """From sending to the first token; 0 without any."""
        return self.arrivals[0][0] if self.arrivals else 0.0

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens; k tokens that come t seconds after the last are k gaps of t / k."""
        gaps: list[float] = []
        for (before_s, _), (at_s, count) in pairwise(self.arrivals):
            gaps += [(at_s - before_s) / count] * count
        return gaps

    @property
    def answered(self) -> bool:
        return self.reason in ("stop", "length")


class Load:
    """Sends queries: `at_once` in flight, or with a rate (a second) at Poisson arrivals.

    `seen` is called after a query is sent and after every delta.
    """

    def __init__(
        self,
        engine: Engine,
        at_once: int,
        rate: float = 0.0,
        seen: Callable[[Stream], None] = lambda stream: None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._engine, self._at_once, self._rate, self._seen = engine, at_once, rate, seen
        self._silence_s = silence_s
        self._inbox: queue.SimpleQueue[tuple[Stream, Delta, float]] = queue.SimpleQueue()
        self._in_flight: set[Stream] = set()
        self.sent: list[Stream] = []
        self._rng = random.Random(0)

    def run(self, queries: Iterator[Query]) -> Iterator[Stream]:
        """Streams as they end; those that never end come last and without a reason."""
        for _ in range(1 if self._rate else self._at_once):
            self._send(next(queries, None))
        due_s = self._next_arrival()
        heard_s = time.perf_counter()
        while self._in_flight or due_s < math.inf:
            if time.perf_counter() >= due_s:
                due_s = self._next_arrival() if self._send(next(queries, None)) else math.inf
            now = time.perf_counter()
            try:
                wait_s = min(heard_s + self._silence_s, due_s) - now
                stream, delta, heard_s = self._inbox.get(timeout=max(0.0, wait_s))
            except queue.Empty:
                if self._in_flight and now - heard_s > self._silence_s:
                    break
                continue
            stream.take(delta, heard_s)
            if stream.reason:
                self._in_flight.remove(stream)
                if not self._rate:
                    self._send(next(queries, None))
            self._seen(stream)
            if stream.reason:
                yield stream
        yield from self._in_flight

    def _next_arrival(self) -> float:
        """When the next query is sent, infinite where each waits for another's end."""
        return time.perf_counter() + self._rng.expovariate(self._rate) if self._rate else math.inf

    def _send(self, query: Query | None) -> bool:
        if query is None:
            return False
        stream = Stream(query)
        self._in_flight.add(stream)
        self.sent.append(stream)
        put = self._inbox.put
        try:
            self._engine.submit(query, lambda delta: put((stream, delta, time.perf_counter())))
        except SlipstreamError as error:
            failed = Delta("", (), finish_reason="error", error=error.message)
            put((stream, failed, time.perf_counter()))
        self._seen(stream)
        return True
