"""The engine: queries in, deltas out, one thread that keeps a batch stepping.

step()  =  between steps (swaps, cancellations)  →  admit  →  batch.step()  →  retire
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from decoder.device.placement import spread_over_cores
from decoder.engine.batch import Batch, BatchLimits
from decoder.models.base import LanguageModel
from decoder.recording.recorder import Recorder
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import LiveSequence, OnDelta
from online.errors import Overloaded, Unavailable
from online.messages import Query, SpeculationStats
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.engine")

MAX_FAULTS = 3  # steps failing in a sequence after which the engine calls itself dead


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
        self.batch = Batch(target, drafts, limits, metrics, device)
        self.limits = limits
        self._tokenizer, self._eos_ids, self._closed_routes = tokenizer, eos_ids, closed_routes
        self._recorder, self._metrics = recorder, metrics
        self.on_finished: Callable[[str, SpeculationStats, float], None] = (
            lambda route, stats, arrived_s: None
        )
        self._waiting: deque[LiveSequence] = deque()
        self._cancelled: set[str] = set()
        self._between: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started = threading.Event()
        self._stopping = False
        self._faults = 0

    # ── called from other threads ──

    def start(self) -> None:
        """Returns when the models are timed and queries are taken up."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._faults < MAX_FAULTS

    @property
    def running(self) -> int:
        return len(self.batch.seqs)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        recorded = query.store and query.route not in self._closed_routes
        seq = LiveSequence(query, on_delta, self._tokenizer, self._eos_ids, recorded)
        with self._wake:
            if not self.alive or self._stopping:
                raise Unavailable("the engine is not running", code="engine_dead")
            if len(self._waiting) >= self.limits.max_waiting:
                raise Overloaded(
                    f"{len(self._waiting)} sequences are waiting already; try again later"
                )
            self._waiting.append(seq)
            self._wake.notify()

    def cancel(self, query_id: str) -> None:
        with self._wake:
            self._cancelled.add(query_id)
            self._wake.notify()

    def between_steps(self, change: Callable[[], None]) -> None:
        """Runs `change` on the engine's thread when no step is under way. Returns at once."""
        with self._wake:
            self._between.append(change)
            self._wake.notify()

    # ── the loop ──

    def _run(self) -> None:
        spread_over_cores(self.limits.threads)
        try:
            self.batch.measure_costs(self._dummies)
        finally:
            self._started.set()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._has_work())
                if self._stopping:
                    break
            try:
                self.step()
                self._faults = 0
            except Exception:
                self._fault()
        for seq in [*self.batch.seqs, *self._waiting]:
            seq.fail("the server is shutting down")

    def _dummies(self, count: int, gamma: int) -> list[LiveSequence]:
        route, tokens = next(iter(self.batch.drafts)), self.limits.max_context // 2
        query = Query(
            "", route, (1,) * 8, tokens, temperature=0.0, gamma=gamma, ignore_eos=True, store=False
        )
        return [
            LiveSequence(query, lambda delta: None, self._tokenizer, self._eos_ids, recorded=False)
            for _ in range(count)
        ]

    def _has_work(self) -> bool:
        return bool(self.batch.seqs or self._waiting or self._between or self._cancelled)

    @torch.inference_mode()
    def step(self) -> None:
        self._between_steps()
        self._admit()
        if self.batch.seqs:
            self.batch.step()
        self._retire()
        self._metrics.occupancy(len(self.batch.seqs), len(self._waiting), self.limits.slots)

    def _between_steps(self) -> None:
        while self._between:
            self._between.popleft()()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [seq for seq in self._waiting if seq.query.id in cancelled]
            if dropped:
                self._waiting = deque(seq for seq in self._waiting if seq.query.id not in cancelled)
        for seq in [*dropped, *(seq for seq in self.batch.seqs if seq.query.id in cancelled)]:
            seq.end("cancelled")
        for seq in dropped:
            self._report(seq)
        self._retire()

    def _admit(self) -> None:
        joined = self._take_waiting()
        if not joined:
            return
        self.batch.join(joined)
        for seq in joined:
            self._metrics.admitted(len(seq.query.prompt_ids), time.monotonic() - seq.arrived_at)

    def _take_waiting(self) -> list[LiveSequence]:
        with self._wake:
            free = self.limits.slots - len(self.batch.seqs)
            return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _retire(self) -> None:
        for seq in self.batch.release():
            self._report(seq)

    def _report(self, seq: LiveSequence) -> None:
        """A sequence has ended: count it, and let the guard and the recorder learn from it."""
        arrived, first, reason = seq.arrived_at, seq.first_token_at, seq.finish_reason
        assert reason is not None
        self._metrics.finished(
            reason, seq.stats, first and first - arrived, time.monotonic() - arrived
        )
        if reason in ("stop", "length"):
            self.on_finished(seq.query.route, seq.stats, arrived)
            if seq.trace is not None:
                seq.trace.output_ids, seq.trace.acceptance = seq.output, seq.stats.acceptance_rate
                self._recorder.offer(seq.trace)

    def _fault(self) -> None:
        """A step failed: its sequences are told, the engine goes on with the next ones."""
        log.exception("a step failed; %d sequences are lost", len(self.batch.seqs))
        self._metrics.faults.labels("engine").inc()
        self._faults += 1
        seqs = self.batch.clear()
        if self._faults >= MAX_FAULTS:
            with self._wake:
                seqs += self._waiting
                self._waiting.clear()
        for seq in seqs:
            seq.fail("the engine failed on this request")
