"""Drafters: what proposes candidates. None knows another, and no verifier knows any of them.

Legend: B rows of a group, N candidates of a row at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from decoder.models.kv_cache import Rows, slot_at
from decoder.models.ragged import integers, ragged
from decoder.policy.draft_cost import FREE, Price
from decoder.policy.keep_rates import DRAWN, Evidence
from decoder.rollout.live import LiveDraft
from decoder.sequence.sequence import Row
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling
from decoder.verification.tree_shape import Scheme, Shape

FEED = (
    8  # tokens that a draft may lack and still get with its first forward; more are encoded before
)


@dataclass(slots=True)
class Group:
    """Rows of a step that are drafted for together."""

    draft: LiveDraft
    scheme: Scheme  # the one with the most candidates
    slots: Rows
    rows: Sequence[Row]
    drafted: list[int]  # candidates, by row; a drafter that finds fewer says so here
    sampling: Sampling
    uniform_BN: Tensor
    vocab_size: int
    device: torch.device | str
    price: Price = FREE  # of what drafting costs all rows of the step, these rows' share
    feed: int = (
        FEED  # tokens of its context that a row's draft may lack and still be asked in this step
    )
    forwards: float | None = (
        None  # of the draft model, where the drafter counts them: prices are learnt from it
    )
    # By row: of candidates whose keys the draft's slot holds, the cell behind the context.
    cells: list[dict[int, int]] = field(default_factory=list)
    evidence: list[list[list[Evidence]]] = field(
        default_factory=list
    )  # by row and candidate: what spoke for it

    @property
    def shape(self) -> Shape:
        return self.scheme.shape.first(max(self.drafted))


class Drafter(Protocol):
    uses_model: bool  # else it needs no draft
    waits: bool  # until its draft is up with a row's context; else it does without, and says when that was a pity

    def scheme(self, row: Row, gamma: int, most: int) -> Scheme:
        """What a row is to draft, where a chain of γ from its draft would be the fastest, and of `most` candidates."""
        ...

    def propose(self, group: Group) -> Proposal | None:
        """None: there is nothing to propose. May write to the draft's cache behind the rows' contexts, and says in
        `draft_cached` what that holds."""
        ...

    def settle(self, group: Group, kept: Sequence[Sequence[int]]) -> None:
        """Verification is over: by row, the candidates that are a part of its context now, in order."""
        ...


def begin(group: Group) -> Tensor:
    """Feeds the draft what its slots lack of the rows' contexts, and returns what it says behind them, [B, 1, V]."""
    unseen = [row.tokens[row.draft_cached :] for row in group.rows]
    starts_B = integers([row.draft_cached for row in group.rows], group.device)
    upto = max(len(row.tokens) for row in group.rows)
    logits_BTV = group.draft.model.forward(
        group.slots, ragged(unseen, group.device), starts_B, upto
    )
    for row in group.rows:
        row.draft_holds(len(row.tokens))
    return behind(logits_BTV, integers([len(tokens) for tokens in unseen], group.device))


def behind(logits_BTV: Tensor, fed_B: Tensor) -> Tensor:
    """Those of each row's last real token, [B, 1, V]."""
    if logits_BTV.shape[1] == 1:
        return logits_BTV
    return logits_BTV.gather(1, (fed_B - 1)[:, None, None].expand(-1, 1, logits_BTV.shape[-1]))


def keep(group: Group, kept: Sequence[Sequence[int]]) -> None:
    """What the draft's slots hold of accepted paths becomes a part of the rows' contexts."""
    for i, (row, path, cells) in enumerate(zip(group.rows, kept, group.cells, strict=True)):
        held = [cells[n] for n in takewhile(cells.__contains__, path)]
        if held != list(range(len(held))):
            group.draft.model.gather(slot_at(group.slots, i), row.draft_cached, held)
        row.draft_holds(row.draft_cached + len(held))


def learn(group: Group, kept: Sequence[Sequence[int]]) -> None:
    """What became of the candidates that verification came to, of chains."""
    for row, path, count, evidence in zip(
        group.rows, kept, group.drafted, group.evidence, strict=True
    ):
        for n in range(min(len(path) + 1, count)):
            for one in evidence[n]:
                known = row.draft.kept if one[1] <= DRAWN else row.suffixes.recent.kept
                known.seen(one, n < len(path))
