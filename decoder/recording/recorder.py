"""The recorder: finished requests become signals in Redis, without the engine ever waiting for it.

The engine hands over what it has on the device anyway. A background thread waits for it to arrive, joins, encodes and
appends it; when its queue is full or Redis is away, signals are dropped and counted.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence

from redis import RedisError

from decoder.recording.trace import Trace, to_signal
from online.buffer import SignalBuffer
from online.metrics import ServiceMetrics
from online.signals import encode

log = logging.getLogger("slipstream.recorder")

GATHER_S, GATHERED = (
    0.1,
    64,
)  # how long requests queue up, and how many of them at most, before they are written
QUEUE_SIZE = 256  # finished requests that wait to be written; more are dropped
RETRY_S = 1.0  # after a failed append, how long signals are dropped without trying again


class Recorder:
    def __init__(
        self,
        buffer: SignalBuffer,
        model: str,
        queue_size: int,
        metrics: ServiceMetrics,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        """`parts`: routes whose signals another one learns from, too."""
        self._buffer, self._parts = buffer, parts or {}
        self._model = model
        self._metrics = metrics
        self._queue: queue.Queue[Trace | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._stopping = threading.Event()
        self._muted_until = 0.0

    def start(self) -> None:
        self._thread.start()

    def offer(self, trace: Trace) -> None:
        """Never blocks, never raises."""
        if not trace.steps:
            return
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            self._metrics.signal_dropped(trace.query.route, "queue_full")

    def stop(self, timeout_s: float = 2.0) -> None:
        """Writes what is queued, for at most `timeout_s`."""
        self._stopping.set()
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ended = False
        while not ended:
            traces = self._gather()
            ended = None in traces
            by_route: dict[str, list[Trace]] = {}
            for trace in traces:
                if trace is not None:
                    by_route.setdefault(trace.query.route, []).append(trace)
            for route, group in by_route.items():
                self._write(route, group)

    def _gather(self) -> list[Trace | None]:
        """What has queued up since the last time: one awakening for many requests, and one call of the buffer."""
        traces = [self._queue.get()]
        if self._queue.qsize() < GATHERED:
            self._stopping.wait(GATHER_S)
        while len(traces) < GATHERED and not self._queue.empty():
            traces.append(self._queue.get_nowait())
        return traces

    def _write(self, route: str, traces: list[Trace]) -> None:
        learners = [route, self._parts[route]] if route in self._parts else [route]
        muted = time.monotonic() < self._muted_until
        encoded = [] if muted else [(self._encoded(trace), trace.acceptance) for trace in traces]
        records = [(record, acceptance) for record, acceptance in encoded if record is not None]
        for learner in learners:
            if time.monotonic() < self._muted_until:
                self._dropped(learner, "redis_down", len(records) or len(traces))
            else:
                self._append(learner, records)

    def _append(self, route: str, records: Sequence[tuple[bytes, float | None]]) -> None:
        try:
            self._buffer.append(
                route,
                *(r for r, _ in records),
                acceptances=[acceptance for _, acceptance in records],
            )
        except RedisError as error:
            self._muted_until = time.monotonic() + RETRY_S
            self._dropped(route, "redis_down", len(records))
            log.warning(
                "%d signals of %s dropped, the buffer does not answer: %s",
                len(records),
                route,
                error,
            )
        except Exception:
            self._dropped(route, "error", len(records))
            log.exception("%d signals of %s dropped", len(records), route)
        else:
            for record, _ in records:
                self._metrics.signal_written(route, len(record))

    def _encoded(self, trace: Trace) -> bytes | None:
        """None if it can't be: a defect in one record must not silence the tap for good."""
        time.sleep(0)  # lets the engine go first
        try:
            return encode(to_signal(trace, self._model))
        except Exception:
            self._dropped(trace.query.route, "error", 1)
            log.exception("signal of %s dropped", trace.query.id)
            return None

    def _dropped(self, route: str, reason: str, count: int) -> None:
        for _ in range(count):
            self._metrics.signal_dropped(route, reason)
