"""Trees verified exactly, by enumeration."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

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
@pytest.mark.parametrize("way_", TREE_MODES)
@pytest.mark.parametrize(("shape", "setting"), CASES)
def test_emitted_distribution_is_the_targets(
    shape: str, way_: str, setting: str, dtype: torch.dtype
) -> None:
    """Every tree shape emits the target's distribution, however its candidates are made."""
    case = Case.of(SHAPES[shape], way_, SETTINGS[setting], dtype)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


@either
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way_", CHAIN_MODES)
def test_chains_verified_as_a_whole_emit_the_targets(
    way_: str, setting: str, dtype: torch.dtype
) -> None:
    """By the longest prefix that passes."""
    case = Case.of(SHAPES["chain"], way_, SETTINGS[setting], dtype)
    assert case.probability_B.sum().item() == pytest.approx(1)
    assert distance(verify, case) <= LIMIT


@either
def test_enumeration_catches_mutants(dtype: torch.dtype) -> None:
    """Siblings drawn without replacement taken for ones with it, and chosen ones for drawn ones, are far outside."""
    distinct = Case.of(SHAPES["two, then two"], WITHOUT_REPLACEMENT, SETTINGS["plain"], dtype)
    mutant = replace(
        distinct.proposal.tree, distinct_B=torch.zeros_like(distinct.proposal.tree.distinct_B)
    )
    assert distance(judging(mutant), distinct) > 1e-2
    chosen = Case.of(SHAPES["three at the root"], CHOSEN_TREE, SETTINGS["plain"], dtype)
    mutant = replace(
        chosen.proposal.tree, sources_BN=torch.zeros_like(chosen.proposal.tree.sources_BN)
    )
    assert distance(judging(mutant), chosen) > 1e-2


@either
def test_a_chain_may_not_choose_its_rule_by_what_was_drawn(dtype: torch.dtype) -> None:
    """As a whole where it goes on, and one by one where it ends early: each is exact, and the two are not."""
    case = Case.of(SHAPES["chain"], LAST_CHOSEN, SETTINGS["plain"], dtype)
    tree, drafted = case.proposal.tree, case.proposal.drafted_B.tolist()
    assert distance(judging(replace(tree, chains=[count == 3 for count in drafted])), case) > 1e-3


@either
def test_what_was_drawn_may_count_as_chosen(dtype: torch.dtype) -> None:
    """Exact, if wasteful: kept with p(x) alone, whatever q was."""
    case = Case.of(SHAPES["three at the root"], WITHOUT_REPLACEMENT, SETTINGS["plain"], dtype)
    assert (
        distance(
            judging(
                replace(
                    case.proposal.tree,
                    sources_BN=torch.full_like(case.proposal.tree.sources_BN, CHOSEN),
                )
            ),
            case,
        )
        <= LIMIT
    )


def judging(tree: Tree) -> Callable[..., Verification]:
    """What takes the proposal for another tree's."""
    return lambda logits_BTV, proposal, *more: verify(
        logits_BTV, replace(proposal, tree=tree), *more
    )
