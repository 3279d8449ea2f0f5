"""The batch: the sequences that decode together, and one speculative step over all of them.

    step()  =  prefill  →  plan  →  draft  →  verify  →  commit

Sequence i lies in slot i of every KV cache. The first `ready` sequences have their prompts encoded
and take part in steps; those behind them wait for their prefill.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from decoder.drafters.stage import DraftStage
from decoder.engine.commit import commit_tokens
from decoder.engine.prefix_slots import PrefixSlots
from decoder.engine.verifier import Verifier
from decoder.models.base import LanguageModel
from decoder.models.ragged import encode, fit
from decoder.policy.gamma import GammaController
from decoder.policy.step_times import StepTimes
from decoder.recording.observation import RecordLimits
from decoder.rollout.live import LiveDraft
from decoder.sequence.plan import Planner
from decoder.sequence.sequence import LiveSequence
from online.metrics import ServiceMetrics


@dataclass(frozen=True)
class BatchLimits:
    """Sizes of a batch."""

    slots: int  # sequences
    kept_contexts: int  # further slots, for contexts of finished sequences
    gamma: int  # drafted tokens of a step, at most, unless the query fixes γ
    prefill_tokens: int  # prompt tokens that one step encodes
    record: RecordLimits  # what signals hold of a step


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
        """`drafts` by route."""
        self.seqs: list[LiveSequence] = []  # shared with other parts: never replace it
        self.target, self.drafts, self.limits = target, drafts, limits
        self.metrics = metrics
        self._device = device
        self.controller = GammaController(StepTimes(limits.gamma, limits.slots), limits.gamma)
        self._planner = Planner(target.vocab_size, device)
        self._stage = DraftStage(
            self.seqs, self.controller, limits.prefill_tokens, target.vocab_size, metrics, device
        )
        self._verifier = Verifier(target, limits.record, device)
        kept_slots = range(limits.slots, limits.slots + limits.kept_contexts)
        self._prefixes = PrefixSlots(self.seqs, target, self._stage.caches, kept_slots)

    @property
    def ready(self) -> int:
        """Sequences before the first one that waits for its prefill."""
        for i, seq in enumerate(self.seqs):
            if seq.waits_for_prefill:
                return i
        return len(self.seqs)

    def step(self) -> None:
        """Every ready sequence emits at least one token. Finished ones stay until `release`."""
        with_prompt = self._prompt_fits_step()
        if not with_prompt:
            self._prefill()
        if not (ready := 1 if with_prompt else self.ready):
            return
        began = time.perf_counter()
        seqs = self.seqs[:ready]
        specs = self._stage.choose(seqs)
        started = time.perf_counter()
        plan = self._planner.plan(seqs, specs)
        plan, proposal = self._stage.draft(plan)
        verification, observation = self._verifier.verify(plan, proposal)
        verified = verification.read(proposal.tokens_BN)
        self._verifier.commit(plan, verified)
        self._stage.commit(verified)
        emitted = commit_tokens(plan, verified, observation, self.metrics)
        if not with_prompt:  # a step that also encodes a prompt says nothing about step times
            seconds = time.perf_counter() - started
            self.controller.observe_step(ready, plan.gamma, seconds, emitted, self._stage.work)
            self._stage.selection.observe(emitted, seconds, started - began)

    # ── join and release ──

    def join(self, seqs: list[LiveSequence]) -> None:
        """Adds sequences. The next steps encode what no other context shares of their prompts."""
        live = self._prefixes.live_contexts()
        for seq in seqs:
            seq.draft = self.drafts[seq.query.route].assigned(seq.query.id)
            seq.acceptance.parent = seq.draft.acceptance
            self._stage.join(seq)
            self._prefixes.reuse(seq, len(self.seqs), live)
            self.metrics.prefix(len(seq.tokens) - 1, seq.cached)
            self.seqs.append(seq)

    def release(self) -> list[LiveSequence]:
        """Removes finished sequences, closes their slots, and keeps contexts for reuse."""
        finished = []
        for slot in reversed(range(len(self.seqs))):
            seq = self.seqs[slot]
            if seq.finish_reason is None:
                continue
            finished.append(seq)
            self._stage.leave(seq)
            self._prefixes.store(slot)
            self._close(slot)
        return finished

    def clear(self) -> list[LiveSequence]:
        """Drops all sequences, whatever state they and the caches are in."""
        seqs = list(self.seqs)
        self.seqs.clear()
        self._prefixes.clear()
        return seqs

    def _close(self, hole: int) -> None:
        """Moves the last ready sequence into the hole, then moves up those that wait, in order."""
        last = self.ready - 1
        if hole < last:
            self._move(last, hole)
            hole = last
        for slot in range(hole + 1, len(self.seqs)):
            self._move(slot, slot - 1)
        self.seqs.pop()

    def _move(self, source: int, destination: int) -> None:
        seq = self.seqs[source]
        self.seqs[destination] = seq
        self._prefixes.copy(seq, source, destination)

    # ── prefill ──

    def _prefill(self) -> None:
        """Encodes the next piece of the waiting prompts."""
        first = self.ready
        waiting = self.seqs[first:]
        prompts = [seq.tokens[seq.cached : len(seq.query.prompt_ids) - 1] for seq in waiting]
        pieces = fit(prompts, self.limits.prefill_tokens)
        slots = list(range(first, first + len(pieces)))
        starts = [self.seqs[slot].cached for slot in slots]
        encode(self.target, slots, pieces, starts, self._device)
        for slot, piece in zip(slots, pieces, strict=True):
            self.seqs[slot].cached += len(piece)

    def _prompt_fits_step(self) -> bool:
        """Whether the only sequence's prompt is short enough for its first step to encode it."""
        if len(self.seqs) != 1:
            return False
        seq = self.seqs[0]
        return seq.waits_for_prefill and seq.uncached <= self.limits.prefill_tokens
