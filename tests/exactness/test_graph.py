"""Graphs are exact if sampled sequences share within a depth only, and inexact otherwise."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.drafters import graph, hypotheses
from decoder.drafters.base import Drafted, DraftGroup
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling
from decoder.verification.token_tree import Tree
from decoder.verification.verify import verify
from lab.enumeration import distance
from lab.enumeration_cases import (
    DRAFT,
    TARGET,
    Case,
    Setting,
    V,
    logits,
    same_sampling,
    tree_logits,
)
from tests.exactness.test_exactness import LIMIT
from tests.tabular import TableModel

DRAFTED_ON, CANDIDATES = 4, 9
FREE: Setting = (1.0, 0, 1.0)
DTYPE = torch.float32  # for the compiled verification: torch takes minutes over so many rows


class Draft(TableModel):
    def logits(self, context: Sequence[int]) -> np.ndarray:
        found: np.ndarray = logits(DRAFT, list(context[1:]), self._dtype).double().numpy()
        return found


class Context:
    """A sequence, as far as drafters know it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.draft_cached = tokens, 0

    def set_draft_cached(self, tokens: int) -> None:
        self.draft_cached = tokens


def group(sampling: Sampling, uniform_BN: Tensor, candidates: int = CANDIDATES) -> DraftGroup:
    count = len(uniform_BN)
    draft: Any = SimpleNamespace(model=Draft(V, 0, count, dtype=DTYPE))
    rows: Any = [Context([0]) for _ in range(count)]
    spec: Any = None
    return DraftGroup(
        draft, spec, slice(0, count), rows, [candidates] * count, sampling, uniform_BN, V, "cpu"
    )


def enumerated() -> tuple[Proposal, Tensor]:
    """Every outcome of the draws as a sequence, and its probability.

    Two of three tokens are drawn behind each hypothesis.
    """
    pairs = list(itertools.permutations(range(V), 2))
    outcomes = list(itertools.product(pairs, repeat=DRAFTED_ON))
    uniform_BN = torch.full((len(outcomes), CANDIDATES), 0.5, dtype=torch.float64)
    # The distribution behind a hypothesis is known once the hypotheses before it are drawn.
    for _ in range(DRAFTED_ON):
        drafted = graph.GraphDrafter().propose(
            group(same_sampling(FREE, len(outcomes)), uniform_BN)
        )
        found = proposal_of(drafted)
        probability_B = torch.ones(len(outcomes), dtype=torch.float64)
        assert found.tree is not None
        for b, count in enumerate(drafted.counts):
            sources = found.tree.sources_BN[b, :count].unique().tolist()
            for i, (first, second) in enumerate(outcomes[b]):
                q = torch.full((V,), 1 / V)
                if i < len(sources):
                    q = found.probs_BQV[b, sources[i]].double()
                left = q.clone()
                left[first] = 0
                for k, (weights, token) in enumerate(((q, first), (left, second))):
                    uniform_BN[b, 2 * i + k] = (
                        weights[:token].sum() + weights[token] / 2
                    ) / weights.sum()
                    probability_B[b] *= weights[token] / weights.sum()
    return found, probability_B


def proposal_of(drafted: Drafted) -> Proposal:
    assert drafted.proposal is not None
    return drafted.proposal


def cases(proposal: Proposal, probability_B: Tensor) -> list[Case]:
    """Sequences by the shape of their trees."""
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
        target_BTV = tree_logits(TARGET, shape, rows, DTYPE)
        found.append(Case(shape, rows, FREE, target_BTV, part, probability_B[members]))
    return found


def shares(proposal: Proposal) -> int:
    """Sequences in which two hypotheses have the same children."""
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
    """By enumeration of all draws and decisions, with one equal token enough to share."""
    monkeypatch.setattr(hypotheses, "SHARED", 1)
    proposal, probability_B = enumerated()
    assert probability_B.sum().item() == pytest.approx(1)
    assert shares(proposal) > 10
    assert distance(verify, *cases(proposal, probability_B)) <= LIMIT


def test_sharing_between_depths_would_not_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As greedy sequences and the paper share: children could be drawn before their parent."""
    monkeypatch.setattr(hypotheses, "SHARED", 1)
    monkeypatch.setattr(
        graph, "Graph", lambda last_token, greedy, made=graph.Graph: made(last_token, True)
    )
    proposal, probability_B = enumerated()
    assert distance(verify, *cases(proposal, probability_B)) > 1e-3


def test_fewer_tokens_are_encoded_than_are_extended() -> None:
    """For a greedy sequence whose draft repeats itself."""

    class Repeats(TableModel):
        def logits(self, context: Sequence[int]) -> np.ndarray:
            return np.array([[0.0, 3.0, 2.0], [2.5, 0.0, 3.0], [3.0, 2.0, 0.0]][context[-1]])

    greedy = Sampling.of([0.0], [0], [1.0], V)
    asked = group(greedy, torch.zeros(1, 20, dtype=torch.float64), 20)
    asked.draft.model = Repeats(V, 0, 1)
    drafted = graph.GraphDrafter().propose(asked)
    found = proposal_of(drafted)
    assert found.tree is not None
    assert drafted.counts == [20]
    extended = len(set(found.tree.parents_BN[0, :20].tolist()))
    assert 0 < sum(logits_BWV.shape[1] for logits_BWV in found.logits_BQV) < extended
