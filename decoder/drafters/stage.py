"""The draft side of a batch: how many tokens each sequence drafts, what its draft still lacks of its context, and proposals.

Nothing that fails here reaches a client: sequences whose draft fails are decoded plainly.
Legend: B sequences, T tokens, G drafted positions, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from decoder.drafters.base import FEED, Drafter, DraftGroup
from decoder.drafters.cascade import CascadeDrafter
from decoder.drafters.early_exit import ExitDrafter
from decoder.drafters.graph import GraphDrafter
from decoder.drafters.model import ModelDrafter
from decoder.drafters.ngrams import NgramDrafter
from decoder.drafters.parallel import ParallelDrafter
from decoder.drafters.plain import PlainDrafter
from decoder.models.ragged import encode, fit, integers, ragged, slots_of
from decoder.policy.bandit import DrafterBandit, Workload
from decoder.policy.draft_cost import DraftWork
from decoder.policy.gamma import GammaController
from decoder.policy.token_acceptance import Evidence, draft_token
from decoder.rollout.live import LiveDraft
from decoder.sequence.ngram_index import NgramLookup, RouteNgrams
from decoder.sequence.plan import StepPlan
from decoder.sequence.sequence import LiveSequence
from decoder.verification.draft_spec import NO_DRAFT, DraftSpec
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.verify import VerifiedSequence
from online.messages import MASKS
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.drafting")
R = TypeVar("R")

DRAFT_PREFILL = 4  # prompt tokens of a draft that cost about as much as one of the target
PLAIN = "plain"  # not a drafter that requests can name: they say `gamma: 0`
PROBED = 8  # tokens that a sequence must have emitted plainly before its draft is probed on them


DRAFTERS: dict[str, Drafter] = {
    "chain": ModelDrafter(trees=False),
    "tree": ModelDrafter(trees=True),
    "ngrams": NgramDrafter(),
    "cascade": CascadeDrafter(),
    "parallel_cascade": CascadeDrafter(MASKS),
    "graph": GraphDrafter(),
    "parallel": ParallelDrafter(),
    "exits": ExitDrafter(),
    PLAIN: PlainDrafter(),
}
AUTO = (
    "chain",
    "cascade",
    "parallel_cascade",
    "ngrams",
    PLAIN,
)  # which of them the engine chooses from by itself


class DraftStage:
    """Works on the batch's own list of sequences: sequence i lies in slot i of every draft's cache."""

    def __init__(
        self,
        seqs: list[LiveSequence],
        controller: GammaController,
        prefill_tokens: int,
        vocab_size: int,
        metrics: ServiceMetrics,
        device: torch.device | str,
    ) -> None:
        self.seqs, self.controller = seqs, controller
        self._prefill_tokens, self._vocab_size = prefill_tokens, vocab_size
        self._metrics, self._device = metrics, device
        self._empty: dict[int, Proposal] = {}
        self._groups: list[tuple[list[int], DraftGroup]] = []  # of the step under way
        self._recent: dict[str, RouteNgrams] = {}  # by route
        self.bandit = DrafterBandit(AUTO)

    def take_in(self, seq: LiveSequence) -> None:
        """A sequence joins."""
        seq.ngram_lookup = NgramLookup(
            self._recent.setdefault(seq.query.route, RouteNgrams()), seq.query.temperature == 0
        )

    def take_leave(self, seq: LiveSequence) -> None:
        """A sequence has come to its end: others may draft from what it says, if it may be learnt from."""
        if seq.trace is not None and seq.finish_reason in ("stop", "length"):
            seq.ngram_lookup.route_ngrams.add_output(seq.tokens, len(seq.query.prompt_ids))

    @property
    def work(self) -> DraftWork | None:
        """The most candidates of a sequence in this step, and the draft's forwards for them; None: that is not known."""
        groups = [group for _, group in self._groups]
        forwards = [group.forwards for group in groups if group.forwards is not None]
        if not groups or len(forwards) < len(groups):
            return None
        return DraftWork(max(max(group.drafted) for group in groups), sum(forwards))

    def copy(self, seq: LiveSequence, source: int, destination: int) -> None:
        """What the sequence's draft has encoded of its context goes to another slot."""
        draft = seq.draft
        if draft.usable and seq.draft_cached:
            self._guarded(draft, lambda: draft.model.copy(source, destination, seq.draft_cached))

    def choose(self, seqs: list[LiveSequence]) -> list[DraftSpec]:
        """What each sequence drafts in this step."""
        drafters = [DRAFTERS[name] for name in self._named(seqs)]
        modelled = [drafter.uses_model for drafter in drafters]
        ours = [
            i
            for i, seq in enumerate(seqs)
            if modelled[i] and seq.draft.usable and seq.query.gamma is None
        ]
        gamma = self.controller.choose_gamma([seqs[i].acceptance.rate for i in ours], len(seqs))
        if gamma == 0 and self.controller.probe_budget_s > 0:
            self._probe(ours)
        wanted = [
            self._wanted(seq, drafter, gamma) for seq, drafter in zip(seqs, drafters, strict=True)
        ]
        fed = [i for i, spec in enumerate(wanted) if spec.candidates and modelled[i]]
        late = [i for i in fed if seqs[i].draft_uncached > self._feed(seqs)]
        asked = [
            i
            for i in late
            if drafters[i].waits or seqs[i].wants_catch_up or seqs[i].query.gamma is not None
        ]
        self._catch_up(asked)
        for i in fed:
            if not seqs[i].draft.usable or (
                drafters[i].waits and seqs[i].draft_uncached > self._feed(seqs)
            ):
                wanted[i] = NO_DRAFT
        return wanted

    def _feed(self, seqs: Sequence[LiveSequence]) -> int:
        """More than one sequence would be padded to the longest."""
        return FEED if len(seqs) > 1 else self._prefill_tokens

    def _named(self, seqs: list[LiveSequence]) -> list[str]:
        """What drafts for each sequence: what its query says, or what is fastest for all that leave it to us."""
        if not (ours := [seq for seq in seqs if seq.query.drafter == "auto"]):
            return [seq.query.drafter for seq in seqs]
        greedy = 2 * sum(seq.query.temperature == 0 for seq in ours) > len(ours)
        chosen = self.bandit.choose(Workload.of(ours[0].query.route, len(seqs), greedy))
        asked = (
            "chain" if chosen == PLAIN else chosen
        )  # for those that say how much is to be drafted
        own = [chosen if seq.query.gamma is None else asked for seq in seqs]
        return [
            name if seq.query.drafter == "auto" else seq.query.drafter
            for seq, name in zip(seqs, own, strict=True)
        ]

    def _wanted(self, seq: LiveSequence, drafter: Drafter, gamma: int) -> DraftSpec:
        asked = seq.query.gamma
        if drafter.uses_model and not seq.draft.usable:
            return NO_DRAFT
        most = 0 if self.controller.plain_step_due else self.controller.max_gamma
        counts = (gamma, most) if asked is None else (asked, asked)
        return drafter.spec(seq, *counts).first(seq.draft_limit)

    # ── context ──

    def _catch_up(self, members: list[int]) -> None:
        """Encodes what drafts lack of their sequences' contexts; what does not fit now is left for the next steps."""
        for draft, group in self._by_draft(members):
            lacking = [self.seqs[i].tokens[self.seqs[i].draft_cached : -1] for i in group]
            pieces = fit(lacking, DRAFT_PREFILL * self._prefill_tokens)
            fed = group[: len(pieces)]
            starts = [self.seqs[i].draft_cached for i in fed]
            self._guarded(
                draft,
                lambda d=draft, f=fed, p=pieces, s=starts: encode(d.model, f, p, s, self._device),  # type: ignore[misc]
            )
            for i, piece in zip(fed, pieces, strict=True):
                self.seqs[i].set_draft_cached(self.seqs[i].draft_cached + len(piece))

    def _probe(self, members: list[int]) -> None:
        """Plain steps say nothing of the draft: now and then a sequence's own output shows what would be accepted."""
        known = {i: min(self.seqs[i].draft_uncached - 1, self.seqs[i].emitted) for i in members}
        ripe = [i for i in members if known[i] >= PROBED]
        if not ripe:
            return
        started = time.perf_counter()
        best = max(ripe, key=lambda i: known[i] / self.seqs[i].draft_uncached)
        draft = self.seqs[best].draft
        if self.seqs[best].draft_uncached > DRAFT_PREFILL * self._prefill_tokens:
            self._catch_up([best])
        else:
            self._guarded(draft, lambda: self._measure(best, known[best], draft))
        self.controller.charge_probe(time.perf_counter() - started)

    def _measure(self, slot: int, known: int, draft: LiveDraft) -> None:
        """Σ_x min(p(x), q(x)) is the mean of min(1, q(x) / p(x)) over x from p: over what plain steps emitted."""
        seq = self.seqs[slot]
        fed, start = seq.tokens[seq.draft_cached : -1], seq.draft_cached
        ids_BT, starts_B = ragged([fed], self._device), integers([start], self._device)
        logits_BTV = draft.model.forward(slice(slot, slot + 1), ids_BT, starts_B, start + len(fed))[
            :, -known:
        ]
        query = seq.query
        sampling = Sampling.of(
            [query.temperature], [query.top_k], [query.top_p], self._vocab_size, self._device
        )
        emitted_1T1 = integers(seq.tokens[-known:], self._device)[None, :, None]
        q = probabilities(logits_BTV, sampling).gather(-1, emitted_1T1).flatten().cpu().numpy()
        p = np.array(seq.emitted_p[-known:])
        drawn = ~np.isnan(p)
        kept = np.minimum(1, q / p)[drawn]
        overlap, compared = float(kept.sum()), len(kept)
        evidence = Evidence(seq.ngram_lookup.greedy, draft_token(), None)
        for one in kept.tolist():
            draft.token_acceptance.record(evidence, one)
        seq.stats.add_probe(overlap, compared)
        seq.acceptance.add(overlap, compared)
        seq.set_draft_cached(start + len(fed))

    # ── proposals ──

    def draft(self, plan: StepPlan) -> Proposal:
        """One proposal for all sequences, of what each group's drafter proposes for its own."""
        self._groups, parts = [], []
        for members, group in self._grouped(plan):
            part = self._guarded(group.draft, lambda g=group: DRAFTERS[g.spec.drafter].propose(g))  # type: ignore[misc]
            for i, count in zip(members, group.drafted, strict=True):
                plan.specs[i] = NO_DRAFT if part is None else plan.specs[i].first(count)
            if part is not None:
                self._groups.append((members, group))
                parts.append((members, part))
        if not parts:
            return self._nothing(len(plan.seqs))
        if len(parts) == 1 and len(parts[0][0]) == len(plan.seqs):
            return parts[0][1]
        return Proposal.merge(parts, len(plan.seqs), self._vocab_size, plan.sampling.all_greedy)

    def settle(self, verdicts: Sequence[VerifiedSequence]) -> None:
        """Before the sequences take their verdicts' tokens: what drafts hold of them becomes a part of their contexts."""
        for members, group in self._groups:
            kept = [verdicts[i].path[: verdicts[i].accepted] for i in members]
            self._guarded(
                group.draft,
                lambda g=group, k=kept: DRAFTERS[g.spec.drafter].settle(g, k),  # type: ignore[misc]
            )

    def _nothing(self, seqs: int) -> Proposal:
        """The plain step's proposal: the same one every time."""
        if seqs not in self._empty:
            self._empty[seqs] = Proposal.empty(
                seqs, 0, self._vocab_size, self._device, greedy=False
            )
        return self._empty[seqs]

    def _grouped(self, plan: StepPlan) -> list[tuple[list[int], DraftGroup]]:
        """Sequences that one draft drafts for in one shape; some of them fewer candidates of it than others."""
        alike: dict[tuple[LiveDraft, DraftSpec], list[int]] = {}
        for i, (seq, spec) in enumerate(zip(plan.seqs, plan.specs, strict=True)):
            if spec.candidates:
                alike.setdefault((seq.draft, replace(spec, candidates=0)), []).append(i)
        if not alike:
            return []
        found, drafting, price = (
            [],
            sum(map(len, alike.values())),
            self.controller.draft_cost(len(plan.seqs)),
        )
        for (draft, _), members in alike.items():
            everyone = len(members) == len(plan.seqs)
            specs = [plan.specs[i] for i in members]
            group = DraftGroup(
                draft,
                max(specs, key=lambda spec: spec.candidates),
                slots_of(members),
                [plan.seqs[i] for i in members],
                [spec.candidates for spec in specs],
                plan.sampling if everyone else plan.sampling.select(members),
                plan.draft_uniform_BN if everyone else plan.draft_uniform_BN[members],
                self._vocab_size,
                self._device,
                price.scaled(len(members) / drafting),
                self._feed(plan.seqs),
            )
            found.append((members, group))
        return found

    def _by_draft(self, members: list[int]) -> list[tuple[LiveDraft, list[int]]]:
        groups: dict[LiveDraft, list[int]] = {}
        for i in members:
            groups.setdefault(self.seqs[i].draft, []).append(i)
        return [(draft, group) for draft, group in groups.items() if draft.usable]

    def _guarded(self, draft: LiveDraft, work: Callable[[], R]) -> R | None:
        """A draft that fails is not used again until weights are installed; its sequences are decoded plainly."""
        try:
            return work()
        except Exception:
            draft.fail()
            for seq in self.seqs:
                if seq.draft is draft:
                    seq.draft_cached = 0
            self._metrics.faults.labels("draft").inc()
            log.exception(
                "version %d of route %s failed; its sequences go on without it",
                draft.version,
                draft.route,
            )
            return None
