"""Graphs: exact by the rule that hypotheses of a sampled row share by depth, and inexact without it."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.drafters import graph
from decoder.drafters.base import DraftGroup
from decoder.verification.proposal import Proposal, Tree
from decoder.verification.sampling import Sampling
from decoder.verification.verify import verify
from lab.enumeration import DRAFT, TARGET, Case, Setting, V, distance, logits, of_all, told
from tests.exactness.test_exactness import LIMIT
from tests.tabular import TableModel

DRAFTED_ON, CANDIDATES = 4, 9
FREE: Setting = (1.0, 0, 1.0)
DTYPE = torch.float32  # verified by what is compiled: torch takes minutes over so many rows


class Draft(TableModel):
    def logits(self, context: Sequence[int]) -> np.ndarray:
        return logits(DRAFT, list(context[1:]), self._dtype).double().numpy()  # type: ignore[no-any-return]


class Context:
    """A row, as far as drafters know it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.draft_cached = tokens, 0

    def set_draft_cached(self, tokens: int) -> None:
        self.draft_cached = tokens


def group(sampling: Sampling, uniform_BN: Tensor, candidates: int = CANDIDATES) -> DraftGroup:
    count = len(uniform_BN)
    draft: Any = SimpleNamespace(model=Draft(V, 0, count, dtype=DTYPE))
    rows: Any = [Context([0]) for _ in range(count)]
    scheme: Any = None
    return DraftGroup(
        draft, scheme, slice(0, count), rows, [candidates] * count, sampling, uniform_BN, V, "cpu"
    )


def drafted() -> tuple[Proposal, Tensor]:
    """Every outcome of the draws as a row, and its probability: two of three tokens behind each hypothesis."""
    pairs = list(itertools.permutations(range(V), 2))
    outcomes = list(itertools.product(pairs, repeat=DRAFTED_ON))
    uniform_BN = torch.full((len(outcomes), CANDIDATES), 0.5, dtype=torch.float64)
    for _ in range(
        DRAFTED_ON
    ):  # what is drawn behind a hypothesis is known when those before it are
        asked = group(of_all(FREE, len(outcomes)), uniform_BN)
        found, probability_B = (
            graph.GraphDrafter().propose(asked),
            torch.ones(len(outcomes), dtype=torch.float64),
        )
        assert found.tree is not None
        for b, count in enumerate(asked.drafted):
            sources = found.tree.sources_BN[b, :count].unique().tolist()
            for i, (first, second) in enumerate(outcomes[b]):
                q = (
                    found.probs_BQV[b, sources[i]].double()
                    if i < len(sources)
                    else torch.full((V,), 1 / V)
                )
                left = q.clone()
                left[first] = 0
                for k, (weights, token) in enumerate(((q, first), (left, second))):
                    uniform_BN[b, 2 * i + k] = (
                        weights[:token].sum() + weights[token] / 2
                    ) / weights.sum()
                    probability_B[b] *= weights[token] / weights.sum()
    return found, probability_B


def cases(proposal: Proposal, probability_B: Tensor) -> list[Case]:
    """Rows by the shape of their trees."""
    tree, alike = proposal.tree, {}
    assert tree is not None
    for b, count in enumerate(proposal.drafted_B.tolist()):
        alike.setdefault(tuple(tree.parents_BN[b, :count].tolist()), []).append(b)
    found = []
    for shape, members in alike.items():
        N = len(shape)
        rows = [tuple(tokens) for tokens in proposal.tokens_BN[members, :N].tolist()]
        own = Tree(
            tree.parents_BN[members, :N], tree.sources_BN[members, :N], tree.distinct_B[members],
            tree.visible_BTT[members, : N + 1, : N + 1], tree.depth, True, [False] * len(members),
        )  # fmt: skip
        part = Proposal(
            proposal.tokens_BN[members, :N],
            proposal.probs_BQV[members],
            [],
            proposal.drafted_B[members],
            own,
        )
        target_BTV = told(TARGET, shape, rows, DTYPE)
        found.append(Case(shape, rows, FREE, target_BTV, part, probability_B[members]))
    return found


def shares(proposal: Proposal) -> int:
    """Rows in which the same draws stand behind two hypotheses."""
    tree, found = proposal.tree, 0
    assert tree is not None
    for b, count in enumerate(proposal.drafted_B.tolist()):
        pairs = set(
            zip(
                tree.sources_BN[b, :count].tolist(),
                tree.parents_BN[b, :count].tolist(),
                strict=True,
            )
        )
        found += len(pairs) > len({source for source, _ in pairs})
    return found


def test_what_is_emitted_is_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By enumeration of all draws and decisions, where one common token is enough to share."""
    monkeypatch.setattr(graph, "SHARED", 1)
    proposal, probability_B = drafted()
    assert probability_B.sum().item() == pytest.approx(1)
    assert shares(proposal) > 10
    assert distance(verify, *cases(proposal, probability_B)) <= LIMIT


def test_sharing_between_depths_would_not_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As greedy rows do it, and the paper: what stands behind a later node was drawn before the node itself."""
    monkeypatch.setattr(graph, "SHARED", 1)
    monkeypatch.setattr(
        graph, "Graph", lambda last_token, greedy, made=graph.Graph: made(last_token, True)
    )
    proposal, probability_B = drafted()
    assert distance(verify, *cases(proposal, probability_B)) > 1e-3


def test_fewer_tokens_are_computed_than_are_drafted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a greedy row whose draft repeats itself."""

    class Repeats(TableModel):
        def logits(self, context: Sequence[int]) -> np.ndarray:
            return np.array([[0.0, 3.0, 2.0], [2.5, 0.0, 3.0], [3.0, 2.0, 0.0]][context[-1]])

    greedy = Sampling.of([0.0], [0], [1.0], V)
    asked = group(greedy, torch.zeros(1, 20, dtype=torch.float64), 20)
    asked.draft.model = Repeats(V, 0, 1)
    found = graph.GraphDrafter().propose(asked)
    assert found.tree is not None
    expanded = len(set(found.tree.parents_BN[0, : asked.drafted[0]].tolist()))
    assert asked.drafted == [20]
    assert 0 < sum(said.shape[1] for said in found.logits_BQV) < expanded
