"""The batch: the rows that are decoded together, and one speculative step over all of them.

    step()  =  prefill  →  plan  →  draft  →  verify  →  commit

Row i lives in slot i of every cache; the first `ready` rows have their prompts encoded and take part in steps.
Legend: B rows, G drafted positions, T = G + 1 verified positions, V vocabulary.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from decoder.control import Control, StepCosts
from decoder.device import upload
from decoder.drafters.chain import Proposal, propose_chain
from decoder.drafts import LiveDraft
from decoder.models import LanguageModel
from decoder.observe import Observation, StepTrace, observe
from decoder.prefixes import Context, Prefixes
from decoder.rows import Row
from decoder.sampling import Sampling, probabilities
from decoder.slots import Rows
from decoder.verify import Verdict, judge
from online.messages import TokenLogprob
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.batch")
R = TypeVar("R")

FEED = 8  # tokens that a draft may lack and still get with its first forward; more are encoded before
DRAFT_PREFILL = 4  # prompt tokens of a draft that cost about as much as one of the target
PROBED = 8  # tokens that a row must have emitted plainly before its draft is probed on them


@dataclass(frozen=True)
class BatchLimits:
    slots: int
    kept_contexts: int  # slots beyond those of rows
    gamma: int
    prefill_tokens: int
    signal_top_k: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step is about to do with its rows."""

    rows: list[Row]
    drafted: list[int]  # tokens to draft, by row
    sampling: Sampling
    draft_uniform_BG: Tensor
    accept_uniform_BG: Tensor
    emit_uniform_B: Tensor

    @property
    def gamma(self) -> int:
        return max(self.drafted)


class Batch:
    """Not thread-safe: one thread joins, steps and releases."""

    def __init__(
        self,
        target: LanguageModel,
        drafts: Mapping[str, LiveDraft],
        limits: BatchLimits,
        metrics: ServiceMetrics,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows: list[Row] = []
        self.target, self.drafts, self.limits = target, drafts, limits
        self.control = Control(StepCosts(limits.gamma, limits.slots), limits.gamma)
        self._prefixes = Prefixes(range(limits.slots, limits.slots + limits.kept_contexts))
        self._metrics, self._device = metrics, device
        self._sampling: tuple[list[Row], Sampling] | None = None

    def measure_costs(self, dummies: Callable[[int, int], list[Row]]) -> None:
        """Times whole steps, for the choice of γ. `dummies` makes rows that all draft γ tokens. Only while empty."""
        metrics, self._metrics = self._metrics, ServiceMetrics("rehearsal")
        try:
            for count in self.control.costs.rows:
                seconds = {gamma: self._timed(dummies(count, gamma)) for gamma in {0, 1, self.control.max_gamma}}
                self.control.costs.measured(count, seconds)
        except Exception:
            # A model that can't run says so at its first step, to the request that needs it.
            log.exception("steps could not be timed")
        finally:
            self.clear()
            self._metrics = metrics
            self.control.credit_s = 0.0
            for draft in self.drafts.values():
                draft.acceptance.forget()

    def _timed(self, rows: list[Row]) -> float:
        """The fastest of a few steps: others are slower for the machine's own reasons. The first ones allocate."""
        self.join(rows)
        taken = []
        for _ in range(8):
            started = time.perf_counter()
            self.step()
            taken.append(time.perf_counter() - started)
        self.clear()
        return min(taken[2:])

    @property
    def ready(self) -> int:
        """Rows before the first one that waits for its prompt."""
        return next((i for i, row in enumerate(self.rows) if row.waits_for_prefill), len(self.rows))

    def step(self) -> None:
        """Every ready row emits at least one token. Rows that end have a finish reason, and stay until `release`."""
        alone = self._alone()
        if not alone:
            self._prefill()
        if not (ready := 1 if alone else self.ready):
            return
        drafted = self._choose(self.rows[:ready])
        started = time.perf_counter()
        plan = self._plan(self.rows[:ready], drafted)
        proposal = self._draft(plan)
        verdict, observation = self._verify(plan, proposal)
        self._commit(plan, verdict.read(proposal.tokens_BG), observation)
        if not alone:
            self.control.stepped(ready, plan.gamma, time.perf_counter() - started)

    # ── joining and leaving ──

    def join(self, rows: list[Row]) -> None:
        """Takes rows in. Their prompts are encoded by the next steps, beyond what another context shares with them."""
        live = [self._context(slot) for slot in range(len(self.rows))]
        for row in rows:
            row.acceptance.parent = self.drafts[row.query.route].acceptance
            self._reuse(row, len(self.rows), live)
            self._metrics.prefix(len(row.tokens) - 1, row.cached)
            self.rows.append(row)

    def _reuse(self, row: Row, slot: int, live: list[Context]) -> None:
        """Copies what another context has of the row's beginning into the row's slot-to-be."""
        draft = self.drafts[row.query.route]
        found = self._prefixes.longest(row.query.route, row.tokens[:-1], draft.version, live)
        if found is None:
            return
        context, row.cached = found
        # What another version wrote would cost acceptance for as long as the prefix is popular.
        if context.draft_version == draft.version:
            row.draft_cached, row.draft_version = min(context.draft_cached, row.cached), draft.version
        self._copy(row, context.slot, slot)
        if not draft.usable:
            row.draft_cached = 0

    def release(self) -> list[Row]:
        """Takes finished rows out, keeps their contexts for others, and closes the holes they leave."""
        finished = []
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.finish_reason is None:
                continue
            finished.append(row)
            context = self._context(slot)
            if (kept := self._prefixes.keep(context)) is not None:
                self._copy(row, slot, kept)
            self._close(slot)
        return finished

    def clear(self) -> list[Row]:
        """Drops all rows, whatever state they and the caches are in."""
        rows, self.rows = self.rows, []
        self._prefixes.clear()
        return rows

    def _close(self, hole: int) -> None:
        """The last ready row moves into the hole, and those that wait for their prompts move up in their order."""
        if hole < (last := self.ready - 1):
            self._move(last, hole)
            hole = last
        for slot in range(hole + 1, len(self.rows)):
            self._move(slot, slot - 1)
        self.rows.pop()

    def _move(self, source: int, destination: int) -> None:
        self.rows[destination] = self.rows[source]
        self._copy(self.rows[source], source, destination)

    def _copy(self, row: Row, source: int, destination: int) -> None:
        if row.cached:
            self.target.copy(source, destination, row.cached)
        draft = self.drafts[row.query.route]
        if draft.usable and row.draft_cached:
            self._guarded(draft, lambda: draft.model.copy(source, destination, row.draft_cached))

    def _context(self, slot: int) -> Context:
        row = self.rows[slot]
        draft_cached = min(row.draft_cached, row.cached)
        return Context(slot, row.query.route, row.tokens[: row.cached], draft_cached, row.draft_version)

    # ── prefill ──

    def _prefill(self) -> None:
        """Encodes the next piece of the prompts that wait."""
        first = self.ready
        waiting = [row.tokens[row.cached : len(row.query.prompt_ids) - 1] for row in self.rows[first:]]
        pieces = fit(waiting, self.limits.prefill_tokens)
        members = list(range(first, first + len(pieces)))
        self._encode(self.target, members, pieces, [self.rows[i].cached for i in members])
        for i, piece in zip(members, pieces, strict=True):
            self.rows[i].cached += len(piece)

    def _alone(self) -> bool:
        """Whether there is one row, with a prompt so short that its first step encodes it along."""
        row = self.rows[0] if len(self.rows) == 1 else None
        return row is not None and row.waits_for_prefill and row.lag <= self.limits.prefill_tokens

    def _catch_up(self, members: list[int]) -> None:
        """Encodes what drafts lack of their rows' contexts; what does not fit now is left for the next steps."""
        for draft, group in self._by_draft(members):
            lacking = [self.rows[i].tokens[self.rows[i].draft_cached : -1] for i in group]
            pieces = fit(lacking, DRAFT_PREFILL * self.limits.prefill_tokens)
            fed = group[: len(pieces)]
            starts = [self.rows[i].draft_cached for i in fed]
            self._guarded(draft, lambda d=draft, f=fed, p=pieces, s=starts: self._encode(d.model, f, p, s))  # type: ignore[misc]
            for i, piece in zip(fed, pieces, strict=True):
                self._fed(self.rows[i], draft, len(piece))

    def _encode(self, model: LanguageModel, members: list[int], pieces: list[list[int]], starts: list[int]) -> None:
        if members:
            upto = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True))
            model.encode(_rows(members), self._ragged(pieces), self._integers(starts), upto)

    def _fed(self, row: Row, draft: LiveDraft, tokens: int) -> None:
        if row.draft_cached == 0:
            row.draft_version = draft.version
        row.draft_cached += tokens if draft.usable else 0

    # ── plan ──

    def _choose(self, rows: list[Row]) -> list[int]:
        """How many tokens each row drafts in this step."""
        usable = [self.drafts[row.query.route].usable for row in rows]
        ours = [i for i, row in enumerate(rows) if usable[i] and row.query.gamma is None]
        gamma = self.control.gamma([rows[i].acceptance.rate for i in ours], len(rows))
        if gamma == 0 and self.control.credit_s > 0:
            self._probe(ours)
        drafted = [row.drafted(gamma) if able else 0 for row, able in zip(rows, usable, strict=True)]
        feed = FEED if len(rows) > 1 else self.limits.prefill_tokens  # more than one row would be padded to the longest
        self._catch_up([i for i, count in enumerate(drafted) if count and rows[i].draft_lag > feed])
        return [0 if rows[i].draft_lag > feed else count for i, count in enumerate(drafted)]

    def _probe(self, members: list[int]) -> None:
        """Plain steps say nothing of the draft: now and then a row's own output shows what would be accepted."""
        known = {i: min(self.rows[i].draft_lag - 1, self.rows[i].emitted) for i in members}
        ripe = [i for i in members if known[i] >= PROBED]
        if not ripe:
            return
        started = time.perf_counter()
        best = max(ripe, key=lambda i: known[i] / self.rows[i].draft_lag)
        draft = self.drafts[self.rows[best].query.route]
        if self.rows[best].draft_lag > DRAFT_PREFILL * self.limits.prefill_tokens:
            self._catch_up([best])
        else:
            self._guarded(draft, lambda: self._measure(best, known[best], draft))
        self.control.spent(time.perf_counter() - started)

    def _measure(self, slot: int, known: int, draft: LiveDraft) -> None:
        """Σ_x min(p(x), q(x)) is the mean of min(1, q(x) / p(x)) over x from p: over what plain steps emitted."""
        row = self.rows[slot]
        fed, start = row.tokens[row.draft_cached : -1], row.draft_cached
        ids_BT, starts_B = self._ragged([fed]), self._integers([start])
        logits_BTV = draft.model.forward(slice(slot, slot + 1), ids_BT, starts_B, start + len(fed))[:, -known:]
        query = row.query
        sampling = Sampling.of([query.temperature], [query.top_k], [query.top_p], self.target.vocab_size, self._device)
        emitted_1T1 = self._integers(row.tokens[-known:])[None, :, None]
        q = probabilities(logits_BTV, sampling).gather(-1, emitted_1T1).flatten().cpu().numpy()
        p = np.array(row.emitted_p[-known:])
        drawn = ~np.isnan(p)
        overlap, compared = float(np.minimum(1, q / p)[drawn].sum()), int(drawn.sum())
        row.stats.add_probe(overlap, compared)
        row.acceptance.add(overlap, compared)
        self._fed(row, draft, len(fed))

    def _plan(self, rows: list[Row], drafted: list[int]) -> StepPlan:
        gamma = max(drafted)
        uniform = np.zeros((len(rows), 2 * gamma + 1))
        for i, (row, count) in enumerate(zip(rows, drafted, strict=True)):
            if row.query.temperature > 0:
                # A row draws only for itself, so its randomness does not depend on who shares the batch.
                own = row.rng.random(2 * count + 1)
                uniform[i, :count], uniform[i, gamma : gamma + count] = own[:count], own[count:-1]
                uniform[i, -1] = own[-1]
        uniform_BU = upload(uniform, self._device)
        return StepPlan(
            rows, drafted, self._sampling_of(rows), uniform_BU[:, :gamma], uniform_BU[:, gamma:-1], uniform_BU[:, -1]
        )

    def _sampling_of(self, rows: list[Row]) -> Sampling:
        """Made anew only when other rows decode than in the step before."""
        if self._sampling is None or self._sampling[0] != rows:
            queries = [row.query for row in rows]
            sampling = Sampling.of(
                [q.temperature for q in queries],
                [q.top_k for q in queries],
                [q.top_p for q in queries],
                self.target.vocab_size,
                self._device,
            )
            self._sampling = rows, sampling
        return self._sampling[1]

    # ── draft ──

    def _draft(self, plan: StepPlan) -> Proposal:
        """One proposal for all rows; each route's draft fills in its own."""
        members = [i for i, count in enumerate(plan.drafted) if count]
        groups = self._by_draft(members)
        proposals = [self._guarded(d, lambda d=d, g=group: self._propose(d, g, plan)) for d, group in groups]  # type: ignore[misc]
        if len(groups) == 1 and len(members) == len(plan.rows) and proposals[0] is not None:
            return proposals[0]
        gamma, greedy, vocabulary = plan.gamma, plan.sampling.all_greedy, self.target.vocab_size
        proposal = Proposal.empty(len(plan.rows), gamma, vocabulary, self._device, greedy)
        for (_, group), part in zip(groups, proposals, strict=True):
            if part is not None:
                proposal.put(group, part)
            else:
                for i in group:
                    plan.drafted[i] = 0
        return proposal

    def _propose(self, draft: LiveDraft, members: list[int], plan: StepPlan) -> Proposal:
        rows = [plan.rows[i] for i in members]
        unseen = [row.tokens[row.draft_cached :] for row in rows]
        everyone = len(members) == len(plan.rows)
        gamma = max(plan.drafted[i] for i in members)
        proposal = propose_chain(
            draft.model,
            _rows(members),
            self._ragged(unseen),
            self._integers([len(tokens) for tokens in unseen]),
            self._integers([row.draft_cached for row in rows]),
            max(len(row.tokens) for row in rows),
            self._integers([plan.drafted[i] for i in members]),
            gamma,
            plan.sampling if everyone else plan.sampling.select(members),
            plan.draft_uniform_BG if everyone else plan.draft_uniform_BG[members],
        )
        for row in rows:
            # Cut back in _commit, where a rejection came earlier.
            self._fed(row, draft, len(row.tokens) + gamma - 1 - row.draft_cached)
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
            for row in self.rows:
                if row.query.route == draft.route:
                    row.draft_cached = 0
            self._metrics.faults.labels("draft").inc()
            log.exception("draft of route %s failed; its rows are decoded without one", draft.route)
            return None

    # ── verify ──

    def _verify(self, plan: StepPlan, proposal: Proposal) -> tuple[Verdict, Observation | None]:
        fed_BT = self._ragged(
            [row.tokens[row.cached :] for row in plan.rows]
        )  # the last token, and a lone row's prompt
        ids_BT = torch.cat([fed_BT, proposal.tokens_BG], 1) if proposal.tokens_BG.shape[1] else fed_BT
        # A row's longest context is its own, not the padded one: padding writes, but nobody reads it.
        upto = max(len(row.tokens) + count for row, count in zip(plan.rows, plan.drafted, strict=True))
        starts_B = self._integers([row.cached for row in plan.rows])
        logits_BTV = self.target.forward(slice(0, len(plan.rows)), ids_BT, starts_B, upto)
        logits_BTV = logits_BTV[:, fed_BT.shape[1] - 1 :]
        if logits_BTV.dtype != torch.float64:
            logits_BTV = logits_BTV.float()  # once, for all who look at them
        verdict = judge(logits_BTV, proposal, plan.sampling, plan.accept_uniform_BG, plan.emit_uniform_B)
        if not any(row.trace is not None or row.query.logprobs is not None for row in plan.rows):
            return verdict, None
        reported = max((row.query.logprobs for row in plan.rows if row.query.logprobs is not None), default=None)
        return verdict, observe(logits_BTV, proposal, verdict, self.limits.signal_top_k, reported)

    # ── commit ──

    def _commit(self, plan: StepPlan, verdicts: list[list[float]], seen: Observation | None) -> None:
        emitted = 0
        for i, (row, drafted, verdict) in enumerate(zip(plan.rows, plan.drafted, verdicts, strict=True)):
            accepted, following, following_p, overlap, *draft = verdict
            accepted = int(accepted)
            start, version = row.emitted, self.drafts[row.query.route].version
            new = [*map(int, draft[:accepted]), int(following)]
            taken, text = row.extend(new)
            row.emitted_p += [*[math.nan] * accepted, following_p][:taken]
            row.cached = len(row.tokens) - 1
            row.draft_cached = min(row.draft_cached, row.cached)
            row.stats.add_step(drafted, accepted, overlap, taken, version)
            row.acceptance.add(overlap, min(accepted + 1, drafted))
            emitted += taken
            logprobs: tuple[TokenLogprob, ...] = ()
            if seen is not None and row.trace is not None:
                row.trace.steps.append(StepTrace(seen, i, start, drafted, accepted, version))
            if seen is not None and (top := row.query.logprobs) is not None:
                logprobs = tuple(seen.token_logprob(i, j, new[j], top) for j in range(taken))
            row.deliver(text, new[:taken], logprobs)
        self._metrics.step(plan.drafted, [int(verdict[0]) for verdict in verdicts], emitted)

    def _integers(self, values: list[int]) -> Tensor:
        return upload(np.array(values, np.int64), self._device)

    def _ragged(self, sequences: list[list[int]]) -> Tensor:
        """Token lists as one padded [B, T]."""
        padded = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = sequence
        return upload(padded, self._device)


def fit(sequences: list[list[int]], budget: int) -> list[list[int]]:
    """As many of the first sequences as `budget` tokens hold, padding included; only the last of them is cut."""
    pieces: list[list[int]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        if pieces and longest * (len(pieces) + 1) > budget:
            break
        pieces.append(sequence[:budget])
        if len(sequence) > budget:
            break  # those behind it wait: the ready ones come first
    return pieces


def _rows(members: list[int]) -> Rows:
    """Neighbouring slots as a slice: the cache gives a view of those, and a copy of anything else."""
    adjacent = members[-1] - members[0] + 1 == len(members)
    return slice(members[0], members[-1] + 1) if adjacent else members
