"""Trees and mixed chains are verified exactly, by enumeration."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoder.verification.proposal import Proposal
from decoder.verification.result import Verification
from decoder.verification.token_tree import CHOSEN, Tree
from decoder.verification.verify import verify
from lab.enumeration import distance
from lab.enumeration_cases import (
    CHAIN_MODES,
    CHOSEN_TREE,
    LAST_CHOSEN,
    SHAPES,
    TREE_MODES,
    WITHOUT_REPLACEMENT,
    Case,
)
from tests.exactness.test_exactness import LIMIT, SETTINGS, either

SMALL = ("chain", "three at the root", "two, then one each")
CASES = [(shape, "plain") for shape in SHAPES] + [
    (shape, setting) for shape in SMALL for setting in ("all three", "greedy")
]


@either
@pytest.mark.parametrize("mode", TREE_MODES)
@pytest.mark.parametrize(("shape", "setting"), CASES)
def test_emitted_distribution_is_the_targets(
    shape: str, mode: str, setting: str, dtype: torch.dtype
) -> None:
    """Every tree shape emits the target's distribution, however its candidates are made."""
    case = Case.of(SHAPES[shape], mode, SETTINGS[setting], dtype)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


@either
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", CHAIN_MODES)
def test_block_verification_emits_the_targets_distribution(
    mode: str, setting: str, dtype: torch.dtype
) -> None:
    """Also where tokens are chosen, and where the chain's length varies."""
    case = Case.of(SHAPES["chain"], mode, SETTINGS[setting], dtype)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


@either
def test_enumeration_catches_mutants(dtype: torch.dtype) -> None:
    """Mistaking how siblings were drawn, or chosen ones for drawn ones, is far outside."""
    distinct = Case.of(SHAPES["two, then two"], WITHOUT_REPLACEMENT, SETTINGS["plain"], dtype)
    mutant = replace(
        distinct.proposal.tree, distinct_B=torch.zeros_like(distinct.proposal.tree.distinct_B)
    )
    assert distance(with_tree(mutant), distinct) > 1e-2
    chosen = Case.of(SHAPES["three at the root"], CHOSEN_TREE, SETTINGS["plain"], dtype)
    mutant = replace(
        chosen.proposal.tree, sources_BN=torch.zeros_like(chosen.proposal.tree.sources_BN)
    )
    assert distance(with_tree(mutant), chosen) > 1e-2


@either
def test_the_rule_may_not_depend_on_what_was_drawn(dtype: torch.dtype) -> None:
    """Block verification of full chains and the tree rule for short ones: not exact together."""
    case = Case.of(SHAPES["chain"], LAST_CHOSEN, SETTINGS["plain"], dtype)
    tree, drafted = case.proposal.tree, case.proposal.drafted_B.tolist()
    assert distance(with_tree(replace(tree, chains=[count == 3 for count in drafted])), case) > 1e-3


@either
def test_what_was_drawn_may_count_as_chosen(dtype: torch.dtype) -> None:
    """Exact but wasteful: accepted with probability p(x), whatever q was."""
    case = Case.of(SHAPES["three at the root"], WITHOUT_REPLACEMENT, SETTINGS["plain"], dtype)
    tree = case.proposal.tree
    all_chosen = replace(tree, sources_BN=torch.full_like(tree.sources_BN, CHOSEN))
    assert distance(with_tree(all_chosen), case) <= LIMIT


def with_tree(tree: Tree) -> Callable[..., Verification]:
    """A verifier that replaces the proposal's tree; a batch may repeat the tree's sequences."""
    count = len(tree.chains)

    def verifier(logits_BTV: Tensor, proposal: Proposal, *more: Any) -> Verification:
        own = tree.select([row % count for row in range(len(logits_BTV))])
        return verify(logits_BTV, replace(proposal, tree=own), *more)

    return verifier
