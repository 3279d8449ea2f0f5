"""The draft side of a batch: how many tokens each row drafts, what its draft still lacks of its context, and proposals.

Nothing that fails here reaches a client: rows whose draft fails are decoded plainly.
Legend: B rows, T tokens, G drafted positions, V vocabulary.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from decoder.drafters.base import FEED, Drafter, Group
from decoder.drafters.cascade import CascadeDrafter
from decoder.drafters.early_exit import ExitDrafter
from decoder.drafters.graph import GraphDrafter
from decoder.drafters.model import ModelDrafter
from decoder.drafters.ngrams import NgramDrafter
from decoder.drafters.parallel import ParallelDrafter
from decoder.drafters.plain import PlainDrafter
from decoder.models.ragged import encode, fit, integers, ragged, slots_of
from decoder.policy.bandit import Choice, Situation
from decoder.policy.gamma import Control
from decoder.policy.keep_rates import ANY, DRAWN
from decoder.rollout.live import LiveDraft
from decoder.sequence.ngram_index import Recent, Suffixes
from decoder.sequence.plan import StepPlan
from decoder.sequence.sequence import Row
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.tree_shape import NOTHING, Scheme
from decoder.verification.verify import HostVerdict
from online.messages import MASKS
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.drafting")
R = TypeVar("R")

DRAFT_PREFILL = 4  # prompt tokens of a draft that cost about as much as one of the target
PLAIN = "plain"  # not a drafter that requests can name: they say `gamma: 0`
PROBED = 8  # tokens that a row must have emitted plainly before its draft is probed on them


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


class Drafting:
    """Works on the batch's own list of rows: row i lies in slot i of every draft's cache."""

    def __init__(
        self,
        rows: list[Row],
        control: Control,
        prefill_tokens: int,
        vocab_size: int,
        metrics: ServiceMetrics,
        device: torch.device | str,
    ) -> None:
        self.rows, self.control = rows, control
        self._prefill_tokens, self._vocab_size = prefill_tokens, vocab_size
        self._metrics, self._device = metrics, device
        self._empty: dict[int, Proposal] = {}
        self._groups: list[tuple[list[int], Group]] = []  # of the step under way
        self._recent: dict[str, Recent] = {}  # by route
        self.choice = Choice(AUTO)

    def take_in(self, row: Row) -> None:
        """A row joins."""
        row.suffixes = Suffixes(
            self._recent.setdefault(row.query.route, Recent()), row.query.temperature == 0
        )

    def take_leave(self, row: Row) -> None:
        """A row has come to its end: others may draft from what it says, if it may be learnt from."""
        if row.trace is not None and row.finish_reason in ("stop", "length"):
            row.suffixes.recent.answered(row.tokens, len(row.query.prompt_ids))

    @property
    def work(self) -> tuple[int, float] | None:
        """The most candidates of a row in this step, and the draft's forwards for them; None: that is not known."""
        groups = [group for _, group in self._groups]
        forwards = [group.forwards for group in groups if group.forwards is not None]
        if not groups or len(forwards) < len(groups):
            return None
        return max(max(group.drafted) for group in groups), sum(forwards)

    def copy(self, row: Row, source: int, destination: int) -> None:
        """What the row's draft has encoded of its context goes to another slot."""
        draft = row.draft
        if draft.usable and row.draft_cached:
            self._guarded(draft, lambda: draft.model.copy(source, destination, row.draft_cached))

    def choose(self, rows: list[Row]) -> list[Scheme]:
        """What each row drafts in this step."""
        drafters = [DRAFTERS[name] for name in self._named(rows)]
        modelled = [drafter.uses_model for drafter in drafters]
        ours = [
            i
            for i, row in enumerate(rows)
            if modelled[i] and row.draft.usable and row.query.gamma is None
        ]
        gamma = self.control.gamma([rows[i].acceptance.rate for i in ours], len(rows))
        if gamma == 0 and self.control.credit_s > 0:
            self._probe(ours)
        wanted = [
            self._wanted(row, drafter, gamma) for row, drafter in zip(rows, drafters, strict=True)
        ]
        fed = [i for i, scheme in enumerate(wanted) if scheme.candidates and modelled[i]]
        late = [i for i in fed if rows[i].draft_lag > self._feed(rows)]
        asked = [
            i
            for i in late
            if drafters[i].waits or rows[i].draft_wanted or rows[i].query.gamma is not None
        ]
        self._catch_up(asked)
        for i in fed:
            if not rows[i].draft.usable or (
                drafters[i].waits and rows[i].draft_lag > self._feed(rows)
            ):
                wanted[i] = NOTHING
        return wanted

    def _feed(self, rows: Sequence[Row]) -> int:
        """More than one row would be padded to the longest."""
        return FEED if len(rows) > 1 else self._prefill_tokens

    def _named(self, rows: list[Row]) -> list[str]:
        """What drafts for each row: what its query says, or what is fastest for all that leave it to us."""
        if not (ours := [row for row in rows if row.query.drafter == "auto"]):
            return [row.query.drafter for row in rows]
        greedy = 2 * sum(row.query.temperature == 0 for row in ours) > len(ours)
        chosen = self.choice.choose(
            Situation(ours[0].query.route, (len(rows) - 1).bit_length(), greedy)
        )
        asked = (
            "chain" if chosen == PLAIN else chosen
        )  # for those that say how much is to be drafted
        own = [chosen if row.query.gamma is None else asked for row in rows]
        return [
            name if row.query.drafter == "auto" else row.query.drafter
            for row, name in zip(rows, own, strict=True)
        ]

    def _wanted(self, row: Row, drafter: Drafter, gamma: int) -> Scheme:
        asked = row.query.gamma
        if drafter.uses_model and not row.draft.usable:
            return NOTHING
        most = 0 if self.control.rechecks else self.control.max_gamma
        counts = (gamma, most) if asked is None else (asked, asked)
        return drafter.scheme(row, *counts).first(row.room)

    # ── context ──

    def _catch_up(self, members: list[int]) -> None:
        """Encodes what drafts lack of their rows' contexts; what does not fit now is left for the next steps."""
        for draft, group in self._by_draft(members):
            lacking = [self.rows[i].tokens[self.rows[i].draft_cached : -1] for i in group]
            pieces = fit(lacking, DRAFT_PREFILL * self._prefill_tokens)
            fed = group[: len(pieces)]
            starts = [self.rows[i].draft_cached for i in fed]
            self._guarded(
                draft,
                lambda d=draft, f=fed, p=pieces, s=starts: encode(d.model, f, p, s, self._device),
            )  # type: ignore[misc]
            for i, piece in zip(fed, pieces, strict=True):
                self.rows[i].draft_holds(self.rows[i].draft_cached + len(piece))

    def _probe(self, members: list[int]) -> None:
        """Plain steps say nothing of the draft: now and then a row's own output shows what would be accepted."""
        known = {i: min(self.rows[i].draft_lag - 1, self.rows[i].emitted) for i in members}
        ripe = [i for i in members if known[i] >= PROBED]
        if not ripe:
            return
        started = time.perf_counter()
        best = max(ripe, key=lambda i: known[i] / self.rows[i].draft_lag)
        draft = self.rows[best].draft
        if self.rows[best].draft_lag > DRAFT_PREFILL * self._prefill_tokens:
            self._catch_up([best])
        else:
            self._guarded(draft, lambda: self._measure(best, known[best], draft))
        self.control.spent(time.perf_counter() - started)

    def _measure(self, slot: int, known: int, draft: LiveDraft) -> None:
        """Σ_x min(p(x), q(x)) is the mean of min(1, q(x) / p(x)) over x from p: over what plain steps emitted."""
        row = self.rows[slot]
        fed, start = row.tokens[row.draft_cached : -1], row.draft_cached
        ids_BT, starts_B = ragged([fed], self._device), integers([start], self._device)
        logits_BTV = draft.model.forward(slice(slot, slot + 1), ids_BT, starts_B, start + len(fed))[
            :, -known:
        ]
        query = row.query
        sampling = Sampling.of(
            [query.temperature], [query.top_k], [query.top_p], self._vocab_size, self._device
        )
        emitted_1T1 = integers(row.tokens[-known:], self._device)[None, :, None]
        q = probabilities(logits_BTV, sampling).gather(-1, emitted_1T1).flatten().cpu().numpy()
        p = np.array(row.emitted_p[-known:])
        drawn = ~np.isnan(p)
        kept = np.minimum(1, q / p)[drawn]
        overlap, compared = float(kept.sum()), len(kept)
        for one in kept.tolist():
            draft.kept.seen((row.suffixes.greedy, DRAWN, ANY), one)
        row.stats.add_probe(overlap, compared)
        row.acceptance.add(overlap, compared)
        row.draft_holds(start + len(fed))

    # ── proposals ──

    def draft(self, plan: StepPlan) -> Proposal:
        """One proposal for all rows, of what each group's drafter proposes for its own."""
        self._groups, parts = [], []
        for members, group in self._grouped(plan):
            part = self._guarded(group.draft, lambda g=group: DRAFTERS[g.scheme.drafter].propose(g))  # type: ignore[misc]
            for i, count in zip(members, group.drafted, strict=True):
                plan.schemes[i] = NOTHING if part is None else plan.schemes[i].first(count)
            if part is not None:
                self._groups.append((members, group))
                parts.append((members, part))
        if not parts:
            return self._nothing(len(plan.rows))
        if len(parts) == 1 and len(parts[0][0]) == len(plan.rows):
            return parts[0][1]
        return Proposal.joined(parts, len(plan.rows), self._vocab_size, plan.sampling.all_greedy)

    def settle(self, verdicts: Sequence[HostVerdict]) -> None:
        """Before the rows take their verdicts' tokens: what drafts hold of them becomes a part of their contexts."""
        for members, group in self._groups:
            kept = [verdicts[i].path[: verdicts[i].accepted] for i in members]
            self._guarded(
                group.draft, lambda g=group, k=kept: DRAFTERS[g.scheme.drafter].settle(g, k)
            )  # type: ignore[misc]

    def _nothing(self, rows: int) -> Proposal:
        """The plain step's proposal: the same one every time."""
        if rows not in self._empty:
            self._empty[rows] = Proposal.empty(
                rows, 0, self._vocab_size, self._device, greedy=False
            )
        return self._empty[rows]

    def _grouped(self, plan: StepPlan) -> list[tuple[list[int], Group]]:
        """Rows that one draft drafts for in one shape; some of them fewer candidates of it than others."""
        alike: dict[tuple[LiveDraft, Scheme], list[int]] = {}
        for i, (row, scheme) in enumerate(zip(plan.rows, plan.schemes, strict=True)):
            if scheme.candidates:
                alike.setdefault((row.draft, replace(scheme, candidates=0)), []).append(i)
        if not alike:
            return []
        found, drafting, price = (
            [],
            sum(map(len, alike.values())),
            self.control.price(len(plan.rows)),
        )
        for (draft, _), members in alike.items():
            everyone = len(members) == len(plan.rows)
            schemes = [plan.schemes[i] for i in members]
            group = Group(
                draft,
                max(schemes, key=lambda scheme: scheme.candidates),
                slots_of(members),
                [plan.rows[i] for i in members],
                [scheme.candidates for scheme in schemes],
                plan.sampling if everyone else plan.sampling.select(members),
                plan.draft_uniform_BN if everyone else plan.draft_uniform_BN[members],
                self._vocab_size,
                self._device,
                price.times(len(members) / drafting),
                self._feed(plan.rows),
            )
            found.append((members, group))
        return found

    def _by_draft(self, members: list[int]) -> list[tuple[LiveDraft, list[int]]]:
        groups: dict[LiveDraft, list[int]] = {}
        for i in members:
            groups.setdefault(self.rows[i].draft, []).append(i)
        return [(draft, group) for draft, group in groups.items() if draft.usable]

    def _guarded(self, draft: LiveDraft, work: Callable[[], R]) -> R | None:
        """A draft that fails is not used again until weights are installed; its rows are decoded plainly."""
        try:
            return work()
        except Exception:
            draft.fail()
            for row in self.rows:
                if row.draft is draft:
                    row.draft_cached = 0
            self._metrics.faults.labels("draft").inc()
            log.exception(
                "version %d of route %s failed; its rows go on without it",
                draft.version,
                draft.route,
            )
            return None
