"""The recorder: finished requests become signals in the buffer. The engine never waits for it.

The engine hands over a trace, whose arrays may still be on their way from the device. A background
thread waits for them, encodes the signal and appends it. When its queue is full or the buffer is
away, signals are dropped and counted.
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

QUEUE_SIZE = 256  # finished requests that wait to be written; more are dropped
GATHER_S = 0.1  # how long requests queue up before they are written together
GATHER_REQUESTS = 64  # written together at most
RETRY_S = 1.0  # after a failed append, how long signals are dropped without a new attempt
Record = tuple[bytes, float | None]  # an encoded signal, and its acceptance


class Recorder:
    def __init__(
        self,
        buffer: SignalBuffer,
        model: str,
        queue_size: int,
        metrics: ServiceMetrics,
        parents: Mapping[str, str] | None = None,
    ) -> None:
        """`model` is the target's fingerprint. `parents`: routes whose signals go to another, too.

        More than `queue_size` finished requests at a time are dropped.
        """
        self._buffer, self._model, self._metrics = buffer, model, metrics
        self._parents = parents or {}
        self._queue: queue.Queue[Trace | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._stopping = threading.Event()
        self._muted_until = 0.0

    def start(self) -> None:
        self._thread.start()

    def offer(self, trace: Trace) -> None:
        """Queues a finished request. Never blocks, never raises."""
        if not trace.steps:
            return
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            self._metrics.signal_dropped(trace.query.route, "queue_full")

    def stop(self, timeout_s: float = 2.0) -> None:
        """Writes queued requests, for at most `timeout_s`."""
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
        """Queued requests; several at once, so that the thread wakes and the buffer is called less.

        None among them: the recorder stops.
        """
        traces = [self._queue.get()]
        if self._queue.qsize() < GATHER_REQUESTS:
            self._stopping.wait(GATHER_S)
        while len(traces) < GATHER_REQUESTS and not self._queue.empty():
            traces.append(self._queue.get_nowait())
        return traces

    def _write(self, route: str, traces: list[Trace]) -> None:
        routes = [route, self._parents[route]] if route in self._parents else [route]
        records = [] if self._muted else self._encoded(traces)
        for learner in routes:
            if self._muted:
                self._dropped(learner, "redis_down", len(records) or len(traces))
            else:
                self._append(learner, records)

    @property
    def _muted(self) -> bool:
        return time.monotonic() < self._muted_until

    def _append(self, route: str, records: Sequence[Record]) -> None:
        signals = [signal for signal, _ in records]
        acceptances = [acceptance for _, acceptance in records]
        try:
            self._buffer.append(route, *signals, acceptances=acceptances)
        except RedisError as error:
            self._muted_until = time.monotonic() + RETRY_S
            self._dropped(route, "redis_down", len(records))
            log.warning(
                "%d signals of route %s are dropped; the buffer does not answer: %s",
                len(records),
                route,
                error,
            )
        except Exception:
            self._dropped(route, "error", len(records))
            log.exception("%d signals of route %s are dropped.", len(records), route)
        else:
            for signal in signals:
                self._metrics.signal_written(route, len(signal))

    def _encoded(self, traces: Sequence[Trace]) -> list[Record]:
        """A request that can't be encoded is dropped alone."""
        records: list[Record] = []
        for trace in traces:
            time.sleep(0)  # lets the engine go first
            try:
                records.append((encode(to_signal(trace, self._model)), trace.acceptance))
            except Exception:
                self._dropped(trace.query.route, "error", 1)
                log.exception("The signal of request %s is dropped.", trace.query.id)
        return records

    def _dropped(self, route: str, reason: str, count: int) -> None:
        for _ in range(count):
            self._metrics.signal_dropped(route, reason)
