"""The batch: the rows that are decoded together, and one speculative step over all of them.

    step()  =  plan  →  draft  →  verify  →  commit

Row i lives in slot i of every cache. Legend: B rows, G drafted positions, T = G + 1 verified positions, V vocabulary.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from decoder.drafters.chain import Proposal, propose_chain
from decoder.drafts import LiveDraft
from decoder.models import LanguageModel
from decoder.observe import Observation, observe
from decoder.rows import Row
from decoder.sampling import Sampling, probabilities
from decoder.slots import Rows
from decoder.verify import Verdict, verify
from online.messages import TokenLogprob
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.batch")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step is about to do with its rows."""

    drafted: list[int]  # tokens to draft, by row
    sampling: Sampling
    draft_uniform_BG: Tensor
    accept_uniform_BG: Tensor
    emit_uniform_B: Tensor


class Batch:
    """Not thread-safe: one thread joins, steps and releases."""

    def __init__(
        self,
        target: LanguageModel,
        drafts: Mapping[str, LiveDraft],
        gamma: int,
        signal_top_k: int,
        metrics: ServiceMetrics,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows: list[Row] = []
        self.target, self.drafts = target, drafts
        self._gamma, self._signal_top_k = gamma, signal_top_k
        self._metrics, self._device = metrics, device

    def step(self) -> None:
        """Every row emits at least one token. Rows that end have a finish reason, and stay until `release`."""
        plan = self._plan()
        proposal = self._draft(plan)
        verdict, observation = self._verify(plan, proposal)
        self._commit(plan, proposal, verdict, observation)

    # ── joining and leaving ──

    def join(self, rows: list[Row]) -> None:
        """Takes rows in: all of their prompt but its last token, which is the first step's input like any step's."""
        first = len(self.rows)
        self.rows += rows
        self._prefill(self.target, slice(first, len(self.rows)), [list(row.query.prompt_ids[:-1]) for row in rows])
        drafting = [slot for slot in range(first, len(self.rows)) if self.rows[slot].gamma(self._gamma)]
        for draft, members in self._by_draft(drafting):
            self._guarded(draft, lambda d=draft, m=members: self._prefill_draft(d, m))  # type: ignore[misc]

    def release(self) -> list[Row]:
        """Takes finished rows out and closes the holes they leave: the last row moves into the first hole."""
        finished = []
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].finish_reason is None:
                continue
            finished.append(self.rows[slot])
            moved = self.rows.pop()
            if slot < len(self.rows):
                self.rows[slot] = moved
                last = len(self.rows)
                self.target.move(last, slot, len(moved.tokens))
                self.drafts[moved.query.route].model.move(last, slot, moved.draft_cached)
        return finished

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
        drafted = [row.gamma(self._gamma) if self.drafts[row.query.route].usable else 0 for row in self.rows]
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
        """A draft that fails is not used again until weights are installed; its rows are decoded plainly."""
        try:
            return work()
        except Exception:
            draft.fail()
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
        seen = observe(logits_BTV, proposal, verdict, self._signal_top_k, reported) if wanted else None
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
                row.trace.steps.append(seen.trace(i, start, drafted[i], accepted[i], version, self._signal_top_k))
            if seen is not None and (top := row.query.logprobs) is not None:
                logprobs = tuple(seen.token_logprob(i, j, new[j], top) for j in range(taken))
            row.deliver(text, new[:taken], logprobs)

    def _ragged(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token lists as one padded [B, T] and their lengths [B]."""
        lengths = [len(sequence) for sequence in sequences]
        padded = [[*sequence, *[0] * (max(lengths) - len(sequence))] for sequence in sequences]
        return torch.tensor(padded, device=self._device), torch.tensor(lengths, device=self._device)


def _rows(members: list[int]) -> Rows:
    """Neighbouring slots as a slice: the cache gives a view of those, and a copy of anything else."""
    adjacent = members[-1] - members[0] + 1 == len(members)
    return slice(members[0], members[-1] + 1) if adjacent else members
