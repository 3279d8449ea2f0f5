"""Drafters are found by their files, and what they declare reaches the API and the trainer."""

from types import SimpleNamespace
from typing import Any

import pytest

from decoder.drafters import registry
from decoder.drafters.cascade import MASKS
from decoder.drafters.plain import PlainDrafter
from online.api.app import create_app
from online.errors import InvalidRequest
from online.settings import Settings
from online.speculation import DraftingOptions

NAMES = [
    "chain",
    "cascade",
    "parallel_cascade",
    "exits",
    "graph",
    "tree",
    "ngrams",
    "parallel",
    "auto",
]


def test_requests_may_name_every_drafter_but_the_plain_one() -> None:
    """The default comes first."""
    assert list(registry.descriptions()) == NAMES


def test_a_name_that_is_taken_is_refused() -> None:
    """Otherwise one drafter would silently replace another."""
    with pytest.raises(ValueError, match="'plain' is taken"):
        registry.by_name([PlainDrafter(), PlainDrafter()])


@pytest.mark.parametrize(
    ("drafting", "teaching"),
    [
        ({}, {}),
        ({"drafter": "tree"}, {}),
        ({"drafter": "ngrams"}, {}),
        ({"drafter": "parallel"}, {"masks": 5}),
        ({"drafter": "parallel", "gamma": 3}, {"masks": 2}),
        ({"drafter": "parallel_cascade"}, {"masks": MASKS}),
        ({"drafter": "auto"}, {"masks": MASKS}),
        ({"drafter": "exits"}, {"exit_weight": 1}),
    ],
)
def test_a_route_needs_what_its_drafter_needs(
    drafting: dict[str, Any], teaching: dict[str, int]
) -> None:
    """Other routes need nothing; "auto" needs what the drafters that it may choose need."""
    told = {"routes": "own,other", "drafters": {"own": drafting}, "gamma": 6}
    settings = Settings.model_validate(told)
    assert registry.teaching_by_route(settings) == {"own": teaching, "other": {}}


@pytest.mark.parametrize(
    ("drafting", "reason"),
    [
        ({"drafter": "oracle"}, "Input should be 'chain', 'cascade'"),
        ({"gamma": 17}, "gamma may be 16 at most"),
        ({"drafter": "cascade", "gamma": 17}, "gamma may be 16 at most"),
    ],
)
def test_settings_of_unknown_drafters_are_refused(drafting: dict[str, Any], reason: str) -> None:
    """By the decoder, before it loads a model."""
    settings = Settings.model_validate({"drafters": {"default": drafting}})
    with pytest.raises(ValueError, match=f"drafters: default: speculation.*{reason}"):
        registry.check_settings(settings)


def test_requests_for_unknown_drafters_are_refused() -> None:
    """With the names that there are, and the number of candidates that a drafter has at most."""
    known = registry.descriptions()
    DraftingOptions(drafter="graph", gamma=17).check(known)
    with pytest.raises(InvalidRequest, match="'parallel' or 'auto'"):
        DraftingOptions(drafter="oracle").check(known)
    with pytest.raises(InvalidRequest, match="gamma may be 16 at most for the drafter 'ngrams'"):
        DraftingOptions(drafter="ngrams", gamma=17).check(known)


def test_openapi_lists_the_drafters() -> None:
    """Of the decoder that serves the API."""
    parts: Any = SimpleNamespace(drafters=registry.descriptions())
    schemas = create_app(parts).openapi()["components"]["schemas"]
    assert schemas["Speculation"]["properties"]["drafter"]["anyOf"][0]["enum"] == NAMES
