"""The engine: continuous batching over slots, one speculative step at a time.

    step()  =  between steps (swaps, cancellations, joins)  →  draft  →  verify  →  commit

Legend: B rows, G drafted positions, T = G + 1 verified positions, V vocabulary.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from decoder.drafters.chain import Proposal, propose_chain
from decoder.drafts import LiveDraft
from decoder.models import LanguageModel
from decoder.observe import Observation, observe
from decoder.recorder import Recorder
from decoder.rows import OnDelta, Row
from decoder.sampling import Sampling, probabilities
from decoder.slots import Rows
from decoder.verify import Verdict, verify
from online.errors import Overloaded, Unavailable
from online.messages import FinishReason, Query, SpeculationStats, TokenLogprob
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.engine")
R = TypeVar("R")

MAX_FAULTS = 3  # steps failing in a row after which the engine calls itself dead


@dataclass(frozen=True, slots=True)
class EngineLimits:
    slots: int
    max_waiting: int
    max_context: int
    gamma: int
    prefill_tokens: int
    signal_top_k: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step is about to do with its rows."""

    drafted: list[int]  # tokens to draft, by row
    sampling: Sampling
    draft_uniform_BG: Tensor
    accept_uniform_BG: Tensor
    emit_uniform_B: Tensor


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
        self.target, self.drafts, self.limits = target, drafts, limits
        self._tokenizer, self._eos_ids, self._closed_routes = tokenizer, eos_ids, closed_routes
        self._recorder, self._metrics, self._device = recorder, metrics, device
        self.on_finished: Callable[[str, SpeculationStats], None] = lambda route, stats: None
        self.rows: list[Row] = []  # row i lives in slot i
        self._waiting: deque[Row] = deque()
        self._cancelled: set[str] = set()
        self._between: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._faults = 0

    # ── called from other threads ──

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._faults < MAX_FAULTS

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, query: Query, on_delta: OnDelta) -> None:
        recorded = query.store and query.route not in self._closed_routes
        row = Row(query, on_delta, self._tokenizer, self._eos_ids, recorded)
        with self._wake:
            if not self.alive or self._stopping:
                raise Unavailable("the engine is not running", code="engine_dead")
            if len(self._waiting) >= self.limits.max_waiting:
                raise Overloaded(f"{len(self._waiting)} sequences are waiting already; try again later")
            self._waiting.append(row)
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
        for row in [*self.rows, *self._waiting]:
            row.fail("the server is shutting down")

    def _has_work(self) -> bool:
        return bool(self.rows or self._waiting or self._between or self._cancelled)

    @torch.inference_mode()
    def step(self) -> None:
        self._between_steps()
        self._admit()
        if self.rows:
            plan = self._plan()
            proposal = self._draft(plan)
            verdict, observation = self._verify(plan, proposal)
            self._commit(plan, proposal, verdict, observation)
        self._metrics.occupancy(len(self.rows), len(self._waiting), self.limits.slots)

    def _between_steps(self) -> None:
        while self._between:
            self._between.popleft()()
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
            if cancelled:
                dropped = [row for row in self._waiting if row.query.id in cancelled]
                self._waiting = deque(row for row in self._waiting if row.query.id not in cancelled)
        if cancelled:
            for row in [*dropped, *(row for row in self.rows if row.query.id in cancelled)]:
                self._finish(row, "cancelled")
            self._release_slots()

    # ── joins ──

    def _admit(self) -> None:
        joined = self._take_waiting()
        if not joined:
            return
        first = len(self.rows)
        self.rows += joined
        slots = list(range(first, len(self.rows)))
        # All of the prompt but its last token: that one is the first step's input, like any step's.
        prompts = [list(row.query.prompt_ids[:-1]) for row in joined]
        self._prefill(self.target, slice(first, len(self.rows)), prompts)
        for draft, members in self._by_draft([slot for slot in slots if self.rows[slot].gamma(self.limits.gamma)]):
            self._guarded(draft, lambda d=draft, m=members: self._prefill_draft(d, m))  # type: ignore[misc]
        for row in joined:
            self._metrics.admitted(len(row.query.prompt_ids), time.monotonic() - row.arrived_at)

    def _take_waiting(self) -> list[Row]:
        """Rows for the free slots, as many as the prefill budget allows, but one at least."""
        joined: list[Row] = []
        longest = 0
        with self._wake:
            while self._waiting and len(self.rows) + len(joined) < self.limits.slots:
                longest = max(longest, len(self._waiting[0].query.prompt_ids))
                if joined and longest * (len(joined) + 1) > self.limits.prefill_tokens:
                    break
                joined.append(self._waiting.popleft())
        return joined

    def _prefill(self, model: LanguageModel, rows: Rows, prompts: list[list[int]]) -> None:
        if longest := max(map(len, prompts)):
            ids_BT, _ = self._ragged(prompts)
            model.forward(rows, ids_BT, torch.zeros(len(prompts), dtype=torch.long), longest, keep=1)

    def _prefill_draft(self, draft: LiveDraft, members: list[int]) -> None:
        prompts = [self.rows[i].tokens[:-1] for i in members]
        self._prefill(draft.model, _rows(members), prompts)
        for i, prompt in zip(members, prompts, strict=True):
            self.rows[i].draft_cached = len(prompt)

    # ── draft ──

    def _plan(self) -> StepPlan:
        drafted = [row.gamma(self.limits.gamma) if self.drafts[row.query.route].usable else 0 for row in self.rows]
        gamma = max(drafted)
        uniform = np.zeros((len(self.rows), 2 * gamma + 1))
        for i, (row, count) in enumerate(zip(self.rows, drafted, strict=True)):
            # A row draws only for itself, so its randomness does not depend on who shares the batch.
            own = row.rng.random(2 * count + 1)
            uniform[i, :count], uniform[i, gamma : gamma + count], uniform[i, -1] = own[:count], own[count:-1], own[-1]
        uniform_BU = torch.from_numpy(uniform).to(self._device)
        queries = [row.query for row in self.rows]
        sampling = Sampling.of(
            [q.temperature for q in queries],
            [q.top_k for q in queries],
            [q.top_p for q in queries],
            self.target.vocab_size,
            self._device,
        )
        return StepPlan(drafted, sampling, uniform_BU[:, :gamma], uniform_BU[:, gamma:-1], uniform_BU[:, -1])

    def _draft(self, plan: StepPlan) -> Proposal:
        """One proposal for all rows; each route's draft fills in its own."""
        proposal = Proposal.empty(len(self.rows), max(plan.drafted), self.target.vocab_size, self._device)
        for draft, members in self._by_draft([i for i, count in enumerate(plan.drafted) if count]):
            ready = self._guarded(draft, lambda d=draft, m=members: self._propose(d, m, plan))  # type: ignore[misc]
            if ready is not None:
                proposal.put(members, ready)
        return proposal

    def _propose(self, draft: LiveDraft, members: list[int], plan: StepPlan) -> Proposal:
        rows = [self.rows[i] for i in members]
        starts = [row.draft_cached for row in rows]
        unseen_BT, unseen_B = self._ragged([row.tokens[row.draft_cached :] for row in rows])
        gamma = max(plan.drafted[i] for i in members)
        proposal = propose_chain(
            draft.model,
            _rows(members),
            unseen_BT,
            unseen_B,
            torch.tensor(starts, device=self._device),
            max(len(row.tokens) for row in rows),
            torch.tensor([plan.drafted[i] for i in members], device=self._device),
            gamma,
            plan.sampling.select(members),
            plan.draft_uniform_BG[members],
        )
        for row in rows:
            row.draft_cached = len(row.tokens) + gamma - 1  # cut back in _commit, where a rejection came earlier
        return proposal

    def _by_draft(self, members: list[int]) -> list[tuple[LiveDraft, list[int]]]:
        groups: dict[str, list[int]] = {}
        for i in members:
            groups.setdefault(self.rows[i].query.route, []).append(i)
        return [(self.drafts[route], group) for route, group in groups.items() if self.drafts[route].usable]

    def _guarded(self, draft: LiveDraft, work: Callable[[], R]) -> R | None:
        """A draft that fails is not used again until the next swap; its rows are decoded plainly."""
        try:
            return work()
        except Exception:
            draft.usable = False
            self._metrics.faults.labels("draft").inc()
            log.exception("draft of route %s failed; its rows are decoded without one", draft.route)
            return None

    # ── verify ──

    def _verify(self, plan: StepPlan, proposal: Proposal) -> tuple[Verdict, Observation | None]:
        last_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._device)
        starts = [len(row.tokens) - 1 for row in self.rows]
        ids_BT = torch.cat([last_B1, proposal.tokens_BG], 1)
        # A row's longest context is its own, not the padded one: padding writes, but nobody reads it.
        upto = max(start + 1 + count for start, count in zip(starts, plan.drafted, strict=True))
        logits_BTV = self.target.forward(slice(0, len(self.rows)), ids_BT, torch.tensor(starts), upto)
        verdict = verify(
            probabilities(logits_BTV, plan.sampling),
            proposal.probs_BGV,
            proposal.tokens_BG,
            proposal.drafted_B,
            plan.accept_uniform_BG,
            plan.emit_uniform_B,
        )
        reported = max((row.query.logprobs or 0 for row in self.rows), default=0)
        wanted = any(row.trace is not None or row.query.logprobs is not None for row in self.rows)
        seen = observe(logits_BTV, proposal, verdict, self.limits.signal_top_k, reported) if wanted else None
        return verdict, seen

    # ── commit ──

    def _commit(self, plan: StepPlan, proposal: Proposal, verdict: Verdict, seen: Observation | None) -> None:
        tokens, drafted = proposal.tokens_BG.tolist(), proposal.drafted_B.tolist()
        accepted, following, overlap = verdict.accepted_B.tolist(), verdict.next_B.tolist(), verdict.overlap_B.tolist()
        for i, row in enumerate(self.rows):
            start, version = row.emitted, self.drafts[row.query.route].version
            new = [*tokens[i][: accepted[i]], following[i]]
            taken, text = row.extend(new)
            row.draft_cached = min(row.draft_cached, len(row.tokens) - 1)
            row.stats.add_step(drafted[i], accepted[i], overlap[i], taken, version)
            self._metrics.step(drafted[i], accepted[i], taken)
            logprobs: tuple[TokenLogprob, ...] = ()
            if seen is not None and row.trace is not None:
                row.trace.steps.append(seen.trace(i, start, drafted[i], accepted[i], version, self.limits.signal_top_k))
            if seen is not None and (top := row.query.logprobs) is not None:
                logprobs = tuple(seen.token_logprob(i, j, new[j], top) for j in range(taken))
            row.deliver(text, new[:taken], logprobs)
        for row in self.rows:
            if row.finish_reason:
                self._finish(row, row.finish_reason)
        self._release_slots()

    def _finish(self, row: Row, reason: FinishReason) -> None:
        if row.finish_reason is None:
            row.finish_reason = reason
            row.deliver("", [])
        arrived, first = row.arrived_at, row.first_token_at
        self._metrics.finished(reason, row.stats, first and first - arrived, time.monotonic() - arrived)
        if reason in ("stop", "length"):
            self.on_finished(row.query.route, row.stats)
            if row.trace is not None:
                row.trace.output_ids = row.output
                self._recorder.offer(row.trace)

    def _release_slots(self) -> None:
        """Closes the holes that finished rows leave: the last row moves into the first hole."""
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].finish_reason is None:
                continue
            moved = self.rows.pop()
            if slot < len(self.rows):
                self.rows[slot] = moved
                last = len(self.rows)
                self.target.move(last, slot, len(moved.tokens))
                self.drafts[moved.query.route].model.move(last, slot, moved.draft_cached)

    def _fault(self) -> None:
        """A step failed: its rows are told, the engine goes on with the next ones."""
        log.exception("a step failed; %d rows are lost", len(self.rows))
        self._metrics.faults.labels("engine").inc()
        self._faults += 1
        rows, self.rows = self.rows, []
        if self._faults >= MAX_FAULTS:
            with self._wake:
                rows += self._waiting
                self._waiting.clear()
        for row in rows:
            row.fail("the engine failed on this request")

    def _ragged(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token lists as one padded [B, T] and their lengths [B]."""
        lengths = [len(sequence) for sequence in sequences]
        padded = [[*sequence, *[0] * (max(lengths) - len(sequence))] for sequence in sequences]
        return torch.tensor(padded, device=self._device), torch.tensor(lengths, device=self._device)


def _rows(members: list[int]) -> Rows:
    """Neighbouring slots as a slice: the cache gives a view of those, and a copy of anything else."""
    adjacent = members[-1] - members[0] + 1 == len(members)
    return slice(members[0], members[-1] + 1) if adjacent else members
