"""The recorder: finished requests become signals in Redis, without the engine ever waiting for it.

The engine hands over what it has on the device anyway. A background thread waits for it to arrive, joins, encodes and
appends it; when its queue is full or Redis is away, signals are dropped and counted.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from redis import RedisError

from decoder.observe import StepTrace
from online.buffer import SignalBuffer
from online.messages import Query
from online.metrics import ServiceMetrics
from online.signals import Signal, encode

log = logging.getLogger("slipstream.recorder")

RETRY_S = 1.0  # after a failed append, how long signals are dropped without trying again


@dataclass(slots=True)
class Trace:
    """One request's steps, until it finishes."""

    query: Query
    steps: list[StepTrace] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


class Recorder:
    def __init__(self, buffer: SignalBuffer, model: str, queue_size: int, metrics: ServiceMetrics) -> None:
        self._buffer = buffer
        self._model = model
        self._metrics = metrics
        self._queue: queue.Queue[Trace | None] = queue.Queue(queue_size)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
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
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _run(self) -> None:
        for trace in iter(self._queue.get, None):
            self._write(trace)

    def _write(self, trace: Trace) -> None:
        route = trace.query.route
        if time.monotonic() < self._muted_until:
            self._metrics.signal_dropped(route, "redis_down")
            return
        try:
            record = encode(to_signal(trace, self._model))
            self._buffer.append(route, record)
        except RedisError as error:
            self._muted_until = time.monotonic() + RETRY_S
            self._metrics.signal_dropped(route, "redis_down")
            log.warning("signal of %s dropped, the buffer does not answer: %s", trace.query.id, error)
        except Exception:
            # A defect in one record must not silence the tap for good.
            self._metrics.signal_dropped(route, "error")
            log.exception("signal of %s dropped", trace.query.id)
        else:
            self._metrics.signal_written(route, len(record))


def to_signal(trace: Trace, model: str) -> Signal:
    query, steps = trace.query, trace.steps
    parts = [step.arrays() for step in steps]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Signal(
        request_id=query.id,
        route=query.route,
        temperature=query.temperature,
        top_p=query.top_p,
        top_k=query.top_k,
        model=model,
        prompt_ids=np.array(query.prompt_ids, np.int32),
        output_ids=np.array(trace.output_ids, np.int32),
        step_start=np.array([s.start for s in steps], np.int32),
        step_drafted=np.array([s.drafted for s in steps], np.int32),
        step_accepted=np.array([s.accepted for s in steps], np.int32),
        step_version=np.array([s.version for s in steps], np.int32),
        draft_ids=joined["draft_ids"].astype(np.int32),
        draft_logp=joined["draft_logp"].astype(np.float16),
        top_ids=joined["top_ids"].astype(np.int32),
        top_logp=joined["top_logp"].astype(np.float16),
        rest_mass=joined["rest_mass"].astype(np.float16),
        draft_top_logp=joined["draft_top_logp"].astype(np.float16),
    )
