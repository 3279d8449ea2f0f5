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

import torch

from decoder.drafters.stage import Drafting
from decoder.models.base import LanguageModel
from decoder.models.ragged import encode, fit, integers, ragged
from decoder.policy.draft_cost import Prices
from decoder.policy.gamma import Control
from decoder.policy.step_times import StepCosts
from decoder.recording.observation import Observation, StepTrace, observe
from decoder.rollout.live import LiveDraft
from decoder.sequence.plan import Planner, StepPlan
from decoder.sequence.prefix_cache import Context, Prefixes
from decoder.sequence.sequence import Row
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32
from decoder.verification.verify import HostVerdict, Verdict, judge
from online.messages import TokenLogprob
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.batch")


@dataclass(frozen=True)
class BatchLimits:
    slots: int
    kept_contexts: int  # slots beyond those of rows
    gamma: int
    prefill_tokens: int
    signal_top_k: int


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
        self._planner = Planner(target.vocab_size, device)
        self._drafting = Drafting(
            self.rows, self.control, limits.prefill_tokens, target.vocab_size, metrics, device
        )

    def measure_costs(self, dummies: Callable[[int, int], list[Row]]) -> None:
        """Times whole steps, for the choice of γ. `dummies` makes rows that all draft γ tokens. Only while empty."""
        metrics, self._metrics = self._metrics, ServiceMetrics("rehearsal")
        try:
            for count in self.control.costs.rows:
                seconds = {
                    gamma: self._timed(dummies(count, gamma))
                    for gamma in {0, 1, self.control.max_gamma}
                }
                self.control.costs.measured(count, seconds)
        except Exception:
            # A model that can't run says so at its first step, to the request that needs it.
            log.exception("steps could not be timed")
        finally:
            self.clear()
            self._metrics = metrics
            self.control.credit_s, self.control.prices = 0.0, Prices()
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
        began = time.perf_counter()
        schemes = self._drafting.choose(self.rows[:ready])
        started = time.perf_counter()
        plan = self._planner.plan(self.rows[:ready], schemes)
        proposal = self._drafting.draft(plan)
        verdict, observation = self._verify(plan, proposal)
        verdicts = verdict.read(proposal.tokens_BN)
        self._settle(plan, verdicts)
        emitted = self._commit(plan, verdicts, observation)
        if not alone:
            seconds = time.perf_counter() - started
            self.control.stepped(ready, plan.gamma, seconds, emitted, self._drafting.work)
            self._drafting.choice.stepped(emitted, seconds, started - began)

    # ── joining and leaving ──

    def join(self, rows: list[Row]) -> None:
        """Takes rows in. Their prompts are encoded by the next steps, beyond what another context shares with them."""
        live = [self._context(slot) for slot in range(len(self.rows))]
        for row in rows:
            row.draft = self.drafts[row.query.route].assigned(row.query.id)
            row.acceptance.parent = row.draft.acceptance
            self._drafting.take_in(row)
            self._reuse(row, len(self.rows), live)
            self._metrics.prefix(len(row.tokens) - 1, row.cached)
            self.rows.append(row)

    def _reuse(self, row: Row, slot: int, live: list[Context]) -> None:
        """Copies what another context has of the row's beginning into the row's slot-to-be."""
        draft = row.draft
        found = self._prefixes.longest(row.query.route, row.tokens[:-1], draft.version, live)
        if found is None:
            return
        context, row.cached = found
        # What another version wrote would cost acceptance for as long as the prefix is popular.
        if context.draft_version == draft.version:
            row.draft_cached, row.draft_version = (
                min(context.draft_cached, row.cached),
                draft.version,
            )
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
            self._drafting.take_leave(row)
            context = self._context(slot)
            if (kept := self._prefixes.keep(context)) is not None:
                self._copy(row, slot, kept)
            self._close(slot)
        return finished

    def clear(self) -> list[Row]:
        """Drops all rows, whatever state they and the caches are in."""
        rows = list(self.rows)
        self.rows.clear()  # the same list stays: the draft side works on it, too
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
        self._drafting.copy(row, source, destination)

    def _context(self, slot: int) -> Context:
        row = self.rows[slot]
        draft_cached = min(row.draft_cached, row.cached)
        return Context(
            slot, row.query.route, row.tokens[: row.cached], draft_cached, row.draft_version
        )

    # ── prefill ──

    def _prefill(self) -> None:
        """Encodes the next piece of the prompts that wait."""
        first = self.ready
        waiting = [
            row.tokens[row.cached : len(row.query.prompt_ids) - 1] for row in self.rows[first:]
        ]
        pieces = fit(waiting, self.limits.prefill_tokens)
        members = list(range(first, first + len(pieces)))
        encode(self.target, members, pieces, [self.rows[i].cached for i in members], self._device)
        for i, piece in zip(members, pieces, strict=True):
            self.rows[i].cached += len(piece)

    def _alone(self) -> bool:
        """Whether there is one row, with a prompt so short that its first step encodes it along."""
        row = self.rows[0] if len(self.rows) == 1 else None
        return row is not None and row.waits_for_prefill and row.lag <= self.limits.prefill_tokens

    # ── verify ──

    def _verify(self, plan: StepPlan, proposal: Proposal) -> tuple[Verdict, Observation | None]:
        fed_BT = ragged(
            [row.tokens[row.cached :] for row in plan.rows], self._device
        )  # the last token, and a lone row's prompt
        ids_BT = torch.cat([fed_BT, proposal.tokens_BN], 1) if proposal.candidates else fed_BT
        # A row's longest context is its own, not the padded one: padding writes, but nobody reads it.
        upto = max(
            len(row.tokens) + count for row, count in zip(plan.rows, plan.drafted, strict=True)
        )
        starts_B = integers([row.cached for row in plan.rows], self._device)
        nodes = None if proposal.tree is None else proposal.tree.nodes(behind=fed_BT.shape[1] - 1)
        logits_BTV = self.target.forward(slice(0, len(plan.rows)), ids_BT, starts_B, upto, nodes)
        logits_BTV = at_least_float32(logits_BTV[:, fed_BT.shape[1] - 1 :])
        drawn = plan.accept_uniform_BN[:, : proposal.candidates], plan.emit_uniform_B
        verdict = judge(logits_BTV, proposal, plan.sampling, *drawn, plan.lenient)
        if not any(row.trace is not None or row.query.logprobs is not None for row in plan.rows):
            return verdict, None
        reported = max(
            (row.query.logprobs for row in plan.rows if row.query.logprobs is not None),
            default=None,
        )
        return verdict, observe(logits_BTV, proposal, verdict, self.limits.signal_top_k, reported)

    # ── commit ──

    def _settle(self, plan: StepPlan, verdicts: list[HostVerdict]) -> None:
        """Of trees, models keep what lies on the accepted paths."""
        for i, (row, verdict) in enumerate(zip(plan.rows, verdicts, strict=True)):
            if (path := verdict.path[: verdict.accepted]) and path[-1] != len(path) - 1:
                self.target.gather(i, len(row.tokens), path)
        self._drafting.settle(verdicts)

    def _commit(self, plan: StepPlan, verdicts: list[HostVerdict], seen: Observation | None) -> int:
        """Returns how many tokens were emitted."""
        emitted = 0
        for i, (row, drafted, verdict) in enumerate(
            zip(plan.rows, plan.drafted, verdicts, strict=True)
        ):
            start, version, accepted, new = (
                row.emitted,
                row.draft.version,
                verdict.accepted,
                verdict.emitted,
            )
            taken, text = row.extend(new)
            row.emitted_p += [*[math.nan] * accepted, verdict.next_p][:taken]
            row.cached = len(row.tokens) - 1
            row.draft_cached = min(row.draft_cached, row.cached)
            row.stats.add_step(drafted, accepted, verdict.overlap, verdict.compared, taken, version)
            row.acceptance.add(verdict.overlap, verdict.compared)
            emitted += taken
            logprobs: tuple[TokenLogprob, ...] = ()
            if seen is not None and row.trace is not None:
                row.trace.steps.append(StepTrace(seen, i, start, accepted, version))
            if seen is not None and (top := row.query.logprobs) is not None:
                logprobs = tuple(seen.token_logprob(i, j, new[j], top) for j in range(taken))
            row.deliver(text, new[:taken], logprobs)
        self._metrics.step(plan.drafted, [verdict.accepted for verdict in verdicts], emitted)
        return emitted
