"""The batch: the sequences that are decoded together, and one speculative step over all of them.

    step()  =  prefill  →  plan  →  draft  →  verify  →  commit

Row i lives in slot i of every cache; the first `ready` sequences have their prompts encoded and take part in steps.
Legend: B sequences, G drafted positions, T = G + 1 verified positions, V vocabulary.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from decoder.drafters.stage import DraftStage
from decoder.models.base import LanguageModel
from decoder.models.ragged import encode, fit, integers, ragged
from decoder.policy.draft_cost import DraftCostModel
from decoder.policy.gamma import GammaController
from decoder.policy.step_times import StepTimes
from decoder.recording.observation import Observation, RecordLimits, observe
from decoder.recording.trace import StepTrace
from decoder.rollout.live import LiveDraft
from decoder.sequence.plan import Planner, StepPlan
from decoder.sequence.prefix_cache import CachedContext, PrefixCache
from decoder.sequence.sequence import LiveSequence
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import at_least_float32
from decoder.verification.verify import Verification, VerifiedSequence, verify
from online.messages import TokenLogprob
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.batch")


@dataclass(frozen=True)
class BatchLimits:
    slots: int
    kept_contexts: int  # slots beyond those of sequences
    gamma: int
    prefill_tokens: int
    record: RecordLimits


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
        self.seqs: list[LiveSequence] = []
        self.target, self.drafts, self.limits = target, drafts, limits
        self.controller = GammaController(StepTimes(limits.gamma, limits.slots), limits.gamma)
        self._prefix_cache = PrefixCache(range(limits.slots, limits.slots + limits.kept_contexts))
        self._metrics, self._device = metrics, device
        self._planner = Planner(target.vocab_size, device)
        self._stage = DraftStage(
            self.seqs, self.controller, limits.prefill_tokens, target.vocab_size, metrics, device
        )

    def measure_costs(self, dummies: Callable[[int, int], list[LiveSequence]]) -> None:
        """Times whole steps, for the choice of γ. `dummies` makes sequences that all draft γ tokens. Only while empty."""
        metrics, self._metrics = self._metrics, ServiceMetrics("rehearsal")
        try:
            for count in self.controller.step_times.batch_sizes:
                seconds = {
                    gamma: self._timed(dummies(count, gamma))
                    for gamma in {0, 1, self.controller.max_gamma}
                }
                self.controller.step_times.calibrate(count, seconds)
        except Exception:
            # A model that can't run says so at its first step, to the request that needs it.
            log.exception("steps could not be timed")
        finally:
            self.clear()
            self._metrics = metrics
            self.controller.probe_budget_s, self.controller.draft_cost_model = 0.0, DraftCostModel()
            for draft in self.drafts.values():
                draft.acceptance.reset()

    def _timed(self, seqs: list[LiveSequence]) -> float:
        """The fastest of a few steps: others are slower for the machine's own reasons. The first ones allocate."""
        self.join(seqs)
        taken = []
        for _ in range(8):
            started = time.perf_counter()
            self.step()
            taken.append(time.perf_counter() - started)
        self.clear()
        return min(taken[2:])

    @property
    def ready(self) -> int:
        """Sequences before the first one that waits for its prompt."""
        return next((i for i, seq in enumerate(self.seqs) if seq.waits_for_prefill), len(self.seqs))

    def step(self) -> None:
        """Every ready sequence emits at least one token. Sequences that end have a finish reason, and stay until `release`."""
        alone = self._alone()
        if not alone:
            self._prefill()
        if not (ready := 1 if alone else self.ready):
            return
        began = time.perf_counter()
        specs = self._stage.choose(self.seqs[:ready])
        started = time.perf_counter()
        plan = self._planner.plan(self.seqs[:ready], specs)
        proposal = self._stage.draft(plan)
        verdict, observation = self._verify(plan, proposal)
        verdicts = verdict.read(proposal.tokens_BN)
        self._settle(plan, verdicts)
        emitted = self._commit(plan, verdicts, observation)
        if not alone:
            seconds = time.perf_counter() - started
            self.controller.observe_step(ready, plan.gamma, seconds, emitted, self._stage.work)
            self._stage.bandit.observe(emitted, seconds, started - began)

    # ── joining and leaving ──

    def join(self, seqs: list[LiveSequence]) -> None:
        """Takes sequences in. Their prompts are encoded by the next steps, beyond what another context shares with them."""
        live = [self._context(slot) for slot in range(len(self.seqs))]
        for seq in seqs:
            seq.draft = self.drafts[seq.query.route].assigned(seq.query.id)
            seq.acceptance.parent = seq.draft.acceptance
            self._stage.take_in(seq)
            self._reuse(seq, len(self.seqs), live)
            self._metrics.prefix(len(seq.tokens) - 1, seq.cached)
            self.seqs.append(seq)

    def _reuse(self, seq: LiveSequence, slot: int, live: list[CachedContext]) -> None:
        """Copies what another context has of the sequence's beginning into the sequence's slot-to-be."""
        draft = seq.draft
        found = self._prefix_cache.find(seq.query.route, seq.tokens[:-1], draft.version, live)
        if found is None:
            return
        context, seq.cached = found
        # What another version wrote would cost acceptance for as long as the prefix is popular.
        if context.draft_version == draft.version:
            seq.draft_cached, seq.draft_version = (
                min(context.draft_cached, seq.cached),
                draft.version,
            )
        self._copy(seq, context.slot, slot)
        if not draft.usable:
            seq.draft_cached = 0

    def release(self) -> list[LiveSequence]:
        """Takes finished sequences out, keeps their contexts for others, and closes the holes they leave."""
        finished = []
        for slot in reversed(range(len(self.seqs))):
            seq = self.seqs[slot]
            if seq.finish_reason is None:
                continue
            finished.append(seq)
            self._stage.take_leave(seq)
            context = self._context(slot)
            if (kept := self._prefix_cache.store(context)) is not None:
                self._copy(seq, slot, kept)
            self._close(slot)
        return finished

    def clear(self) -> list[LiveSequence]:
        """Drops all sequences, whatever state they and the caches are in."""
        seqs = list(self.seqs)
        self.seqs.clear()  # the same list stays: the draft side works on it, too
        self._prefix_cache.clear()
        return seqs

    def _close(self, hole: int) -> None:
        """The last ready sequence moves into the hole, and those that wait for their prompts move up in their order."""
        if hole < (last := self.ready - 1):
            self._move(last, hole)
            hole = last
        for slot in range(hole + 1, len(self.seqs)):
            self._move(slot, slot - 1)
        self.seqs.pop()

    def _move(self, source: int, destination: int) -> None:
        self.seqs[destination] = self.seqs[source]
        self._copy(self.seqs[source], source, destination)

    def _copy(self, seq: LiveSequence, source: int, destination: int) -> None:
        if seq.cached:
            self.target.copy(source, destination, seq.cached)
        self._stage.copy(seq, source, destination)

    def _context(self, slot: int) -> CachedContext:
        seq = self.seqs[slot]
        draft_cached = min(seq.draft_cached, seq.cached)
        return CachedContext(
            slot, seq.query.route, seq.tokens[: seq.cached], draft_cached, seq.draft_version
        )

    # ── prefill ──

    def _prefill(self) -> None:
        """Encodes the next piece of the prompts that wait."""
        first = self.ready
        waiting = [
            seq.tokens[seq.cached : len(seq.query.prompt_ids) - 1] for seq in self.seqs[first:]
        ]
        pieces = fit(waiting, self.limits.prefill_tokens)
        members = list(range(first, first + len(pieces)))
        encode(self.target, members, pieces, [self.seqs[i].cached for i in members], self._device)
        for i, piece in zip(members, pieces, strict=True):
            self.seqs[i].cached += len(piece)

    def _alone(self) -> bool:
        """Whether there is one sequence, with a prompt so short that its first step encodes it along."""
        seq = self.seqs[0] if len(self.seqs) == 1 else None
        return (
            seq is not None and seq.waits_for_prefill and seq.uncached <= self.limits.prefill_tokens
        )

    # ── verify ──

    def _verify(
        self, plan: StepPlan, proposal: Proposal
    ) -> tuple[Verification, Observation | None]:
        fed_BT = ragged(
            [seq.tokens[seq.cached :] for seq in plan.seqs], self._device
        )  # the last token, and a lone sequence's prompt
        ids_BT = torch.cat([fed_BT, proposal.tokens_BN], 1) if proposal.candidates else fed_BT
        # A sequence's longest context is its own, not the padded one: padding writes, but nobody reads it.
        upto = max(
            len(seq.tokens) + count for seq, count in zip(plan.seqs, plan.drafted, strict=True)
        )
        starts_B = integers([seq.cached for seq in plan.seqs], self._device)
        nodes = None if proposal.tree is None else proposal.tree.positions(fed_BT.shape[1] - 1)
        logits_BTV = self.target.forward(slice(0, len(plan.seqs)), ids_BT, starts_B, upto, nodes)
        logits_BTV = at_least_float32(logits_BTV[:, fed_BT.shape[1] - 1 :])
        drawn = plan.accept_uniform_BN[:, : proposal.candidates], plan.emit_uniform_B
        verdict = verify(logits_BTV, proposal, plan.sampling, *drawn, plan.lenient)
        if not any(seq.trace is not None or seq.query.logprobs is not None for seq in plan.seqs):
            return verdict, None
        reported = max(
            (seq.query.logprobs for seq in plan.seqs if seq.query.logprobs is not None),
            default=None,
        )
        return verdict, observe(logits_BTV, proposal, verdict, self.limits.record, reported)

    # ── commit ──

    def _settle(self, plan: StepPlan, verdicts: list[VerifiedSequence]) -> None:
        """Of trees, models keep what lies on the accepted paths."""
        for i, (seq, verdict) in enumerate(zip(plan.seqs, verdicts, strict=True)):
            if (path := verdict.path[: verdict.accepted]) and path[-1] != len(path) - 1:
                self.target.keep_path(i, len(seq.tokens), path)
        self._stage.settle(verdicts)

    def _commit(
        self, plan: StepPlan, verdicts: list[VerifiedSequence], seen: Observation | None
    ) -> int:
        """Returns how many tokens were emitted."""
        emitted = 0
        for i, (seq, drafted, verdict) in enumerate(
            zip(plan.seqs, plan.drafted, verdicts, strict=True)
        ):
            start, version, accepted, new = (
                seq.emitted,
                seq.draft.version,
                verdict.accepted,
                verdict.emitted,
            )
            taken, text = seq.append(new)
            seq.emitted_p += [*[math.nan] * accepted, verdict.next_p][:taken]
            seq.cached = len(seq.tokens) - 1
            seq.draft_cached = min(seq.draft_cached, seq.cached)
            seq.stats.add_step(drafted, accepted, verdict.overlap, verdict.compared, taken, version)
            seq.acceptance.add(verdict.overlap, verdict.compared)
            emitted += taken
            logprobs: tuple[TokenLogprob, ...] = ()
            if seen is not None and seq.trace is not None:
                seq.trace.steps.append(StepTrace(seen, i, start, accepted))
            if seen is not None and (top := seq.query.logprobs) is not None:
                logprobs = tuple(seen.token_logprob(i, j, new[j], top) for j in range(taken))
            seq.deliver(text, new[:taken], logprobs)
        self._metrics.step(plan.drafted, [verdict.accepted for verdict in verdicts], emitted)
        return emitted
