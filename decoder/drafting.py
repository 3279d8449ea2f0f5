"""The draft side of a batch: how many tokens each row drafts, what its draft still lacks of its context, and proposals.

Nothing that fails here reaches a client: rows whose draft fails are decoded plainly.
Legend: B rows, T tokens, G drafted positions, V vocabulary.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from decoder.control import Control
from decoder.drafters.chain import Proposal, propose_chain
from decoder.drafts import LiveDraft
from decoder.plan import StepPlan
from decoder.ragged import encode, fit, integers, ragged, slots_of
from decoder.rows import Row
from decoder.sampling import Sampling, probabilities
from online.metrics import ServiceMetrics

log = logging.getLogger("slipstream.drafting")
R = TypeVar("R")

FEED = 8  # tokens that a draft may lack and still get with its first forward; more are encoded before
DRAFT_PREFILL = 4  # prompt tokens of a draft that cost about as much as one of the target
PROBED = 8  # tokens that a row must have emitted plainly before its draft is probed on them


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

    def copy(self, row: Row, source: int, destination: int) -> None:
        """What the row's draft has encoded of its context goes to another slot."""
        draft = row.draft
        if draft.usable and row.draft_cached:
            self._guarded(draft, lambda: draft.model.copy(source, destination, row.draft_cached))

    def choose(self, rows: list[Row]) -> list[int]:
        """How many tokens each row drafts in this step."""
        usable = [row.draft.usable for row in rows]
        ours = [i for i, row in enumerate(rows) if usable[i] and row.query.gamma is None]
        gamma = self.control.gamma([rows[i].acceptance.rate for i in ours], len(rows))
        if gamma == 0 and self.control.credit_s > 0:
            self._probe(ours)
        drafted = [row.drafted(gamma) if able else 0 for row, able in zip(rows, usable, strict=True)]
        feed = FEED if len(rows) > 1 else self._prefill_tokens  # more than one row would be padded to the longest
        self._catch_up([i for i, count in enumerate(drafted) if count and rows[i].draft_lag > feed])
        return [0 if rows[i].draft_lag > feed else count for i, count in enumerate(drafted)]

    # ── context ──

    def _catch_up(self, members: list[int]) -> None:
        """Encodes what drafts lack of their rows' contexts; what does not fit now is left for the next steps."""
        for draft, group in self._by_draft(members):
            lacking = [self.rows[i].tokens[self.rows[i].draft_cached : -1] for i in group]
            pieces = fit(lacking, DRAFT_PREFILL * self._prefill_tokens)
            fed = group[: len(pieces)]
            starts = [self.rows[i].draft_cached for i in fed]
            self._guarded(draft, lambda d=draft, f=fed, p=pieces, s=starts: encode(d.model, f, p, s, self._device))  # type: ignore[misc]
            for i, piece in zip(fed, pieces, strict=True):
                self._fed(self.rows[i], draft, len(piece))

    def _fed(self, row: Row, draft: LiveDraft, tokens: int) -> None:
        if row.draft_cached == 0:
            row.draft_version = draft.version
        row.draft_cached += tokens if draft.usable else 0

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
        logits_BTV = draft.model.forward(slice(slot, slot + 1), ids_BT, starts_B, start + len(fed))[:, -known:]
        query = row.query
        sampling = Sampling.of([query.temperature], [query.top_k], [query.top_p], self._vocab_size, self._device)
        emitted_1T1 = integers(row.tokens[-known:], self._device)[None, :, None]
        q = probabilities(logits_BTV, sampling).gather(-1, emitted_1T1).flatten().cpu().numpy()
        p = np.array(row.emitted_p[-known:])
        drawn = ~np.isnan(p)
        overlap, compared = float(np.minimum(1, q / p)[drawn].sum()), int(drawn.sum())
        row.stats.add_probe(overlap, compared)
        row.acceptance.add(overlap, compared)
        self._fed(row, draft, len(fed))

    # ── proposals ──

    def draft(self, plan: StepPlan) -> Proposal:
        """One proposal for all rows; each draft fills in its own rows' part."""
        members = [i for i, count in enumerate(plan.drafted) if count]
        if not members:
            return self._nothing(len(plan.rows))
        groups = self._by_draft(members)
        proposals = [self._guarded(d, lambda d=d, g=group: self._propose(d, g, plan)) for d, group in groups]  # type: ignore[misc]
        if len(groups) == 1 and len(members) == len(plan.rows) and proposals[0] is not None:
            return proposals[0]
        gamma, greedy, vocabulary = plan.gamma, plan.sampling.all_greedy, self._vocab_size
        proposal = Proposal.empty(len(plan.rows), gamma, vocabulary, self._device, greedy)
        for (_, group), part in zip(groups, proposals, strict=True):
            if part is not None:
                proposal.put(group, part)
            else:
                for i in group:
                    plan.drafted[i] = 0
        return proposal

    def _nothing(self, rows: int) -> Proposal:
        """The plain step's proposal: the same one every time."""
        if rows not in self._empty:
            self._empty[rows] = Proposal.empty(rows, 0, self._vocab_size, self._device, greedy=False)
        return self._empty[rows]

    def _propose(self, draft: LiveDraft, members: list[int], plan: StepPlan) -> Proposal:
        rows = [plan.rows[i] for i in members]
        unseen = [row.tokens[row.draft_cached :] for row in rows]
        everyone = len(members) == len(plan.rows)
        gamma = max(plan.drafted[i] for i in members)
        proposal = propose_chain(
            draft.model,
            slots_of(members),
            ragged(unseen, self._device),
            integers([len(tokens) for tokens in unseen], self._device),
            integers([row.draft_cached for row in rows], self._device),
            max(len(row.tokens) for row in rows),
            integers([plan.drafted[i] for i in members], self._device),
            gamma,
            plan.sampling if everyone else plan.sampling.select(members),
            plan.draft_uniform_BG if everyone else plan.draft_uniform_BG[members],
        )
        for row in rows:
            # Cut back in _commit, where a rejection came earlier.
            self._fed(row, draft, len(row.tokens) + gamma - 1 - row.draft_cached)
        return proposal

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
            log.exception("version %d of route %s failed; its rows go on without it", draft.version, draft.route)
            return None
