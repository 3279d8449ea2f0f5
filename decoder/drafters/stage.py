"""The draft side of a step: what each sequence drafts, and one proposal for the batch.

    choose  →  (plan)  →  draft  →  (verify)  →  commit

Nothing that fails here reaches a client: sequences whose draft fails decode plainly.
Legend: B sequences, N candidates of a sequence at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from decoder.drafters.base import MAX_LAG, Drafted, Drafter, DraftGroup
from decoder.drafters.caches import DraftCaches
from decoder.drafters.faults import DraftFaults
from decoder.drafters.grouping import group_of, members_by_draft
from decoder.drafters.probe import IdleProbe
from decoder.drafters.registry import drafters
from decoder.drafters.selection import DrafterSelection
from decoder.policy.draft_cost import DraftCost, DraftWork
from decoder.policy.gamma import GammaController
from decoder.sequence.ngram_index import NgramLookup, RouteNgrams
from decoder.sequence.plan import StepPlan
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import NO_DRAFT, DraftSpec
from decoder.verification.proposal import Proposal
from decoder.verification.result import VerifiedSequence
from online.metrics import ServiceMetrics


@dataclass(frozen=True, slots=True)
class GroupDraft:
    """A group's part of the current step."""

    members: list[int]
    group: DraftGroup
    drafted: Drafted
    proposal: Proposal


class DraftStage:
    """Works on the batch's own list: sequence i lies in slot i of every draft's cache."""

    def __init__(
        self,
        seqs: list[LiveSequence],
        controller: GammaController,
        prefill_tokens: int,
        vocab_size: int,
        metrics: ServiceMetrics,
        device: torch.device | str,
    ) -> None:
        self._controller, self._prefill_tokens = controller, prefill_tokens
        self._vocab_size, self._device = vocab_size, device
        self._drafters = drafters()
        self.selection = DrafterSelection(self._drafters)
        self._faults = DraftFaults(seqs, metrics)
        self.caches = DraftCaches(seqs, self._faults, prefill_tokens, device)
        self._probe = IdleProbe(seqs, controller, self.caches, self._faults, vocab_size, device)
        self._parts: list[GroupDraft] = []
        self._plain_proposals: dict[int, Proposal] = {}  # by number of sequences
        self._route_ngrams: dict[str, RouteNgrams] = {}

    # ── sequences ──

    def join(self, seq: LiveSequence) -> None:
        """Gives a new sequence the n-grams of its route."""
        route_ngrams = self._route_ngrams.setdefault(seq.query.route, RouteNgrams())
        seq.ngram_lookup = NgramLookup(route_ngrams, seq.query.temperature == 0)

    def leave(self, seq: LiveSequence) -> None:
        """Adds a complete answer to its route's n-grams, if it may be recorded."""
        if seq.trace is not None and seq.finish_reason in ("stop", "length"):
            seq.ngram_lookup.route_ngrams.add_output(seq.tokens, len(seq.query.prompt_ids))

    # ── choose ──

    def choose(self, seqs: Sequence[LiveSequence]) -> list[DraftSpec]:
        """What each sequence drafts in this step. Drafts that lag too far catch up first."""
        chosen = self.selection.choose(seqs)
        gamma = self._gamma(seqs, chosen)
        specs = [self._spec(seq, chosen[i], gamma) for i, seq in enumerate(seqs)]
        drafting = [i for i, spec in enumerate(specs) if spec.candidates and chosen[i].uses_model]
        max_lag = self._max_lag(len(seqs))
        lagging = [i for i in drafting if seqs[i].draft_uncached > max_lag]
        self.caches.catch_up([i for i in lagging if _catches_up(seqs[i], chosen[i])])
        for i in drafting:
            waits = chosen[i].waits_for_draft and seqs[i].draft_uncached > max_lag
            if waits or not seqs[i].draft.usable:
                specs[i] = NO_DRAFT
        return specs

    def _gamma(self, seqs: Sequence[LiveSequence], chosen: Sequence[Drafter]) -> int:
        """The fastest γ for sequences that leave it to the engine. Probes idle drafts."""
        free = [
            i
            for i, seq in enumerate(seqs)
            if chosen[i].uses_model and seq.draft.usable and seq.query.gamma is None
        ]
        rates = [seqs[i].acceptance.rate for i in free]
        gamma = self._controller.choose_gamma(rates, len(seqs))
        if gamma == 0 and self._controller.probe_budget_s > 0:
            self._probe.run(free)
        return gamma

    def _spec(self, seq: LiveSequence, drafter: Drafter, gamma: int) -> DraftSpec:
        if drafter.uses_model and not seq.draft.usable:
            return NO_DRAFT
        most = 0 if self._controller.plain_step_due else self._controller.max_gamma
        if seq.query.gamma is not None:
            gamma = most = seq.query.gamma
        return drafter.spec(seq, gamma, most).first(seq.draft_limit)

    def _max_lag(self, count: int) -> int:
        """Unlike a single sequence, one of several pads the first forward of all with its lag."""
        return MAX_LAG if count > 1 else self._prefill_tokens

    # ── draft ──

    def draft(self, plan: StepPlan) -> tuple[StepPlan, Proposal]:
        """Drafts for all sequences. Returns the plan with what was drafted, and the proposal."""
        self._parts = []
        members_of_groups = members_by_draft(plan)
        if not members_of_groups:
            return plan, self._plain_proposal(len(plan.seqs))
        specs = list(plan.specs)
        cost = self._controller.draft_cost(len(plan.seqs))
        drafting = sum(map(len, members_of_groups))
        for members in members_of_groups:
            part = self._draft_group(plan, members, cost.scaled(len(members) / drafting))
            for n, i in enumerate(members):
                specs[i] = NO_DRAFT if part is None else specs[i].first(part.drafted.counts[n])
            if part is not None:
                self._parts.append(part)
        return replace(plan, specs=specs), self._joint_proposal(plan)

    def _draft_group(
        self, plan: StepPlan, members: list[int], cost: DraftCost
    ) -> GroupDraft | None:
        """None: the drafter proposes nothing, or the draft failed."""
        max_lag = self._max_lag(len(plan.seqs))
        group = group_of(plan, members, cost, max_lag, self._vocab_size, self._device)
        drafter = self._drafters[group.spec.drafter]
        drafted = self._faults.contain(group.draft, partial(drafter.propose, group))
        if drafted is None or drafted.proposal is None:
            return None
        return GroupDraft(members, group, drafted, drafted.proposal)

    def _joint_proposal(self, plan: StepPlan) -> Proposal:
        count = len(plan.seqs)
        if not self._parts:
            return self._plain_proposal(count)
        if len(self._parts) == 1 and len(self._parts[0].members) == count:
            return self._parts[0].proposal
        parts = [(part.members, part.proposal) for part in self._parts]
        return Proposal.merge(parts, count, self._vocab_size, plan.sampling.all_greedy)

    def _plain_proposal(self, count: int) -> Proposal:
        """A plain step's empty proposal, made once for each number of sequences."""
        if count not in self._plain_proposals:
            self._plain_proposals[count] = Proposal.empty(
                count, 0, self._vocab_size, self._device, greedy=False
            )
        return self._plain_proposals[count]

    # ── commit ──

    def commit(self, verified: Sequence[VerifiedSequence]) -> None:
        """Tells drafters what was accepted, before the sequences extend."""
        for part in self._parts:
            accepted = [verified[i].path[: verified[i].accepted] for i in part.members]
            drafter = self._drafters[part.group.spec.drafter]
            commit = partial(drafter.commit, part.group, part.drafted, accepted)
            self._faults.contain(part.group.draft, commit)

    @property
    def work(self) -> DraftWork | None:
        """What this step drafted; None: nothing, or a drafter did not count its forwards."""
        forwards = [part.drafted.forwards for part in self._parts]
        counted = [count for count in forwards if count is not None]
        if not counted or len(counted) < len(forwards):
            return None
        return DraftWork(max(max(part.drafted.counts) for part in self._parts), sum(counted))


def _catches_up(seq: LiveSequence, drafter: Drafter) -> bool:
    """Whether a lagging draft is worth encoding the sequence's context."""
    return drafter.waits_for_draft or seq.wants_catch_up or seq.query.gamma is not None
