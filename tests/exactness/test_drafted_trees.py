"""The trees that the draft model proposes: each node's parent and distribution."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from decoder.drafters.model import propose
from decoder.verification.proposal import Proposal
from decoder.verification.sampling import Sampling, probabilities
from decoder.verification.tree_shape import TreeShape, chain_shape
from lab.enumeration import outcome_masses
from tests.exactness.test_exactness import PROMPT, SETTINGS, V, either
from tests.tabular import TableModel

BUSH = TreeShape((0, 0, 1, 1, 2))


def drafted(
    shape: TreeShape,
    setting: tuple[float, int, float],
    uniform_BN: Tensor,
    distinct: bool,
    dtype: torch.dtype,
) -> Proposal:
    count = len(uniform_BN)
    model = TableModel(V, 3, count, dtype=dtype)
    sampling = Sampling.of(*([value] * count for value in setting), V)  # type: ignore[arg-type]
    fed = torch.tensor([PROMPT] * count)
    full_B = torch.full((count,), len(shape.parents))
    starts_B, unseen_B = torch.zeros(count, dtype=torch.long), torch.full((count,), len(PROMPT))
    rows, upto = slice(0, count), len(PROMPT)
    return propose(
        model, rows, fed, unseen_B, starts_B, upto, full_B, shape, sampling, uniform_BN, distinct
    )


def context(shape: TreeShape, tokens: list[int], node: int) -> list[int]:
    ancestors = [n for n in range(1, node + 1) if shape.visible[node, n]]
    return [*PROMPT, *(tokens[n - 1] for n in ancestors)]


@either
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("setting", ["plain", "all three"])
def test_candidates_are_drawn_from_the_drafts_distribution(
    setting: str, distinct: bool, dtype: torch.dtype
) -> None:
    """Each from its parent's distribution, if distinct without the siblings before it."""
    rng, count = np.random.default_rng(0), 40
    uniform_BN = torch.from_numpy(rng.random((count, 5)))
    found = drafted(BUSH, SETTINGS[setting], uniform_BN, distinct, dtype)
    assert found.tree is not None
    one = Sampling.of(*([value] for value in SETTINGS[setting]), V)  # type: ignore[arg-type]
    table = TableModel(V, 3, dtype=dtype)
    for n, parent in enumerate(BUSH.parents):

        def draw(u: Tensor, n: int = n) -> Tensor:
            other_BN = uniform_BN.clone()
            other_BN[:, n] = u
            return drafted(BUSH, SETTINGS[setting], other_BN, distinct, dtype).tokens_BN[:, n]

        masses_BV = outcome_masses(draw, count, V)
        for b, tokens in enumerate(found.tokens_BN.tolist()):
            logits = torch.from_numpy(table.logits(context(BUSH, tokens, parent))).to(dtype)
            q = probabilities(logits[None, None], one)[0, 0]
            assert torch.allclose(found.probs_BQV[b, found.tree.sources_BN[b, n]], q)
            before = [tokens[m] for m in range(n) if BUSH.parents[m] == parent] if distinct else []
            q[before] = 0
            if q.sum() > 0:
                assert torch.allclose(masses_BV[b], (q / q.sum()).double(), atol=1e-6)


@either
def test_greedy_sequences_get_the_most_likely_tokens(dtype: torch.dtype) -> None:
    """Each node's candidates are the draft's most likely tokens there, in that order."""
    shape = TreeShape.of_widths((3, 2))
    found = drafted(shape, SETTINGS["greedy"], torch.zeros(1, 9, dtype=torch.float64), True, dtype)
    tokens, table = found.tokens_BN[0].tolist(), TableModel(V, 3, dtype=dtype)
    for node, own in itertools.chain.from_iterable(
        zip(level.nodes, level.candidates, strict=True) for level in shape.levels
    ):
        best = np.argsort(-table.logits(context(shape, tokens, node)))
        assert [tokens[n] for n in own] == best[: len(own)].tolist()


def test_shapes() -> None:
    """Shapes of widths, chains, and the best shape of a size against all others of it."""
    assert TreeShape.of_widths((2, 1)).parents == (0, 0, 1, 2)
    assert (chain_shape(3).is_chain, BUSH.is_chain) == (True, False)
    rates, depth = [0.6, 0.2, 0.1], 3
    for candidates in range(1, 7):
        best = TreeShape.best(rates, candidates, depth)
        assert len(best.parents) == candidates
        assert value(best, rates) == pytest.approx(
            max(value(each, rates) for each in every(candidates, depth, len(rates)))
        )


def every(candidates: int, depth: int, width: int) -> list[TreeShape]:
    """All shapes with so many candidates, ordered by depth."""
    found = [
        TreeShape(parents)
        for parents in itertools.product(range(candidates), repeat=candidates)
        if all(parent <= n for n, parent in enumerate(parents)) and list(parents) == sorted(parents)
    ]
    return [
        s
        for s in found
        if max(s.depths) <= depth
        and list(s.depths) == sorted(s.depths)
        and max(s.parents.count(p) for p in s.parents) <= width
    ]


def value(shape: TreeShape, rates: list[float]) -> float:
    """Expected accepted candidates."""
    reached, rank = [1.0], {}
    for parent in shape.parents:
        rank[parent] = rank.get(parent, -1) + 1
        reached.append(reached[parent] * rates[rank[parent]])
    return sum(reached[1:])
