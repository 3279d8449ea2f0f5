"""The engine: takes queries, emits deltas, and runs one thread that steps a batch.

step()  =  changes and cancellations  →  admit  →  batch.step()  →  retire
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from tokenizers import Tokenizer

from decoder.device.placement import spread_over_cores
from decoder.engine.batch import Batch, BatchLimits
from decoder.engine.inbox import Inbox
from decoder.engine.step_timing import measure_step_times
from decoder.models.base import LanguageModel
from decoder.recording.recorder import Recorder
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence, OnDelta
from online.errors import Unavailable
from online.messages import Query, SpeculationStats
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.engine")

MAX_FAULTS = 3  # failed steps in a row after which the engine reports itself dead
OnFinished = Callable[[str, SpeculationStats, float], None]  # route, figures, arrival time
R = TypeVar("R")


@dataclass(frozen=True)
class EngineLimits(BatchLimits):
    max_waiting: int
    max_context: int
    threads: int = 0  # of torch, on a CPU; 0: torch's default


class Engine:
    def __init__(
        self,
        target: LanguageModel,
        drafts: Mapping[str, LiveDraft],
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        limits: EngineLimits,
        recorder: Recorder,
        metrics: ServiceMetrics,
        closed_routes: frozenset[str] = frozenset(),
        device: torch.device | str = "cpu",
    ) -> None:
        """`drafts` by route. Queries on `closed_routes` are never recorded."""
        self.batch = Batch(target, drafts, limits, metrics, device)
        self.limits = limits
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._closed_routes = closed_routes
        self._recorder, self._metrics = recorder, metrics
        self.on_finished: OnFinished = lambda route, stats, arrived_s: None
        self._inbox = Inbox(limits.max_waiting)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started = threading.Event()
        self._faults = 0

    # ── called from other threads ──

    def start(self) -> None:
        """Starts the engine's thread; returns once step times are measured."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """Ends the engine's thread after the current step. Unfinished sequences fail."""
        self._inbox.close()
        self._thread.join(10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._faults < MAX_FAULTS

    @property
    def running(self) -> int:
        return len(self.batch.seqs)

    @property
    def waiting(self) -> int:
        return self._inbox.waiting

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        """Queues a query. `on_delta` is called on the engine's thread.

        Raises:
            Unavailable: the engine is stopped or dead.
            Overloaded: `max_waiting` queries wait already.
        """
        recorded = query.store and query.route not in self._closed_routes
        seq = LiveSequence(query, on_delta, self._tokenizer, self._eos_ids, recorded)
        if not self.alive:
            raise Unavailable("the engine is not running", code="engine_dead")
        self._inbox.put(seq)

    def cancel(self, query_id: str) -> None:
        """Ends a query before the next step. An unknown id is ignored."""
        self._inbox.cancel(query_id)

    def between_steps(self, change: Callable[[], R]) -> Future[R]:
        """Runs `change` on the engine's thread before its next step. Returns at once.

        The future holds what `change` returns or raises; an error there does not stop the engine.
        The future is cancelled if the engine stops first.
        """
        return self._inbox.change(change)

    # ── the engine's thread ──

    def _run(self) -> None:
        spread_over_cores(self.limits.threads)
        try:
            measure_step_times(self.batch, self._timing_sequences)
        finally:
            self._started.set()
        while self._inbox.wait(busy=bool(self.batch.seqs)):
            try:
                self.step()
                self._faults = 0
            except Exception:
                self._fault()
        for seq in [*self.batch.seqs, *self._inbox.take(self.waiting)]:
            seq.fail("the server is shutting down")
        self._inbox.drop_changes()

    def _timing_sequences(self, count: int, gamma: int) -> list[LiveSequence]:
        """Sequences of half the longest context, on which the batch measures its step times."""
        route, tokens = next(iter(self.batch.drafts)), self.limits.max_context // 2
        query = Query(
            "", route, (1,) * 8, tokens, temperature=0.0, gamma=gamma, ignore_eos=True, store=False
        )
        return [
            LiveSequence(query, lambda delta: None, self._tokenizer, self._eos_ids, recorded=False)
            for _ in range(count)
        ]

    @torch.inference_mode()
    def step(self) -> None:
        """Applies changes, admits queries, steps the batch, and reports what has finished."""
        self._inbox.run_changes()
        self._drop_cancelled()
        self._admit()
        if self.batch.seqs:
            self.batch.step()
        self._retire()
        self._metrics.occupancy(self.running, self.waiting, self.limits.slots)

    def _drop_cancelled(self) -> None:
        ids, waited = self._inbox.take_cancelled()
        for seq in waited + [seq for seq in self.batch.seqs if seq.query.id in ids]:
            seq.end("cancelled")
        for seq in waited:
            self._report(seq)
        self._retire()

    def _admit(self) -> None:
        joined = self._inbox.take(self.limits.slots - self.running)
        if joined:
            self.batch.join(joined)
        for seq in joined:
            self._metrics.admitted(len(seq.query.prompt_ids), time.monotonic() - seq.arrived_at)

    def _retire(self) -> None:
        for seq in self.batch.release():
            self._report(seq)

    def _report(self, seq: LiveSequence) -> None:
        """Counts a finished sequence, and hands it to the rollout guard and the recorder."""
        reason = seq.finish_reason
        assert reason is not None
        first_token_s = seq.first_token_at and seq.first_token_at - seq.arrived_at
        self._metrics.finished(reason, seq.stats, first_token_s, time.monotonic() - seq.arrived_at)
        if reason not in ("stop", "length"):
            return
        self.on_finished(seq.query.route, seq.stats, seq.arrived_at)
        if seq.trace is not None:
            seq.trace.output_ids = seq.output
            seq.trace.acceptance = seq.stats.acceptance_rate
            self._recorder.offer(seq.trace)

    def _fault(self) -> None:
        """A step failed: its sequences fail, and the engine goes on with the next ones."""
        log.exception("A step failed; %d sequences are lost.", len(self.batch.seqs))
        self._metrics.faults.labels("engine").inc()
        self._faults += 1
        lost = self.batch.clear()
        if self._faults >= MAX_FAULTS:
            lost += self._inbox.take(self.waiting)
        for seq in lost:
            seq.fail("the engine failed on this request")
