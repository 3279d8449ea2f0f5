"""The recipe of a route."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from decoder.drafters.cascade import MASKS
from decoder.drafters.registry import teaching_by_route
from online.settings import Settings
from online.signals import Signal
from online.tables import Version
from tests.signals import taught
from tests.tiny import TinyPair
from trainer import recipe_search
from trainer.recipe import Recipe
from trainer.recipe_search import (
    CANDIDATES,
    Search,
    choose_recipe,
    configured_recipe,
    inherited_change,
    run_search,
)

BASE = Recipe(epochs=2, learning_rate=3e-3, rehearsal=0)


@pytest.fixture(scope="module")
def examples(pair: TinyPair) -> list[Signal]:
    """Short answers: as many as two rounds of a search need."""
    return taught(pair.target, 64, tokens=8, k=16)


def spoilt(pair: TinyPair) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(pair.spoilt, dtype=torch.float32)  # type: ignore[no-any-return]


def test_candidates_are_recipes() -> None:
    """Each is valid and unique."""
    made = [Recipe.of(change) for change in CANDIDATES]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    ("drafting", "needs"),
    [
        ({}, {"masks": 0, "exit_weight": 0}),
        ({"drafter": "tree"}, {"masks": 0, "exit_weight": 0}),
        ({"drafter": "ngrams"}, {"masks": 0, "exit_weight": 0}),
        ({"drafter": "parallel"}, {"masks": 5, "exit_weight": 0}),
        ({"drafter": "parallel", "gamma": 3}, {"masks": 2, "exit_weight": 0}),
        ({"drafter": "parallel_cascade"}, {"masks": MASKS, "exit_weight": 0}),
        ({"drafter": "auto"}, {"masks": MASKS, "exit_weight": 0}),
        ({"drafter": "exits"}, {"masks": 0, "exit_weight": 1}),
    ],
)
def test_a_route_trains_for_its_drafter(
    drafting: dict[str, object], needs: dict[str, float]
) -> None:
    """And other routes do not; what is set by hand comes first."""
    options = {"routes": "own,other", "drafters": {"own": drafting}, "gamma": 6}
    settings = Settings.model_validate(options)
    teaching = teaching_by_route(settings)
    assert configured_recipe(settings, teaching["own"], 7) == replace(Recipe(seed=7), **needs)
    assert configured_recipe(settings, teaching["other"], 7) == Recipe(seed=7)
    by_hand = Settings.model_validate({**options, "recipe": {"masks": 1, "exit_weight": 0.5}})
    expected = Recipe(masks=1, exit_weight=0.5, seed=7)
    assert configured_recipe(by_hand, teaching["own"], 7) == expected


def test_the_search_halves_the_candidates(pair: TinyPair, examples: list[Signal]) -> None:
    """Every round has the configured recipe, beside the better others; the parent is unchanged."""
    module = spoilt(pair)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found, tried = run_search(Search(module, examples, 4, 3), BASE)
    assert [
        len([t for t in tried if t.lessons == n]) for n in sorted({t.lessons for t in tried})
    ] == [3, 2]
    last = tried[3:]
    assert found in [one.change for one in last]
    best = max(tried[1:3], key=lambda one: one.tokens_per_step)
    assert [one.change for one in last] == [{}, best.change]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert run_search(Search(module, examples, 4, 3), BASE) == (found, tried)


def test_a_recipe_that_ruins_the_draft_is_not_chosen(
    pair: TinyPair, examples: list[Signal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search picks only a change that is proven better."""
    ruin, help_ = {"learning_rate": 30.0}, {"epochs": 6}
    for candidates, chosen in ((({}, ruin), {}), ((ruin, help_), help_), (({}, {"seed": 0}), {})):
        monkeypatch.setattr(recipe_search, "CANDIDATES", candidates)
        assert run_search(Search(spoilt(pair), examples, 4, 3), BASE)[0] == chosen


def test_few_examples_start_no_search(pair: TinyPair, examples: list[Signal]) -> None:
    """The configured recipe stays."""
    assert run_search(Search(spoilt(pair), examples[:30], 4, 3), BASE) == ({}, ())


def test_a_change_is_inherited_until_the_traffic_shifts(
    pair: TinyPair, examples: list[Signal]
) -> None:
    """A parent below its promised acceptance starts a new search."""
    module = spoilt(pair)
    kept = {"divergence": "kl+acceptance"}
    recipe = {
        **replace(BASE, **kept, seed=7).as_dict(),
        "choice": kept,
        "over": {"divergence": "forward_kl"},
    }  # type: ignore[arg-type]
    parent = Version(route="r", recipe=recipe, gate={"candidate_acceptance": 0.02})
    assert choose_recipe(Search(module, examples, 4, 3), BASE, parent) == {
        "choice": kept,
        "over": {"divergence": "forward_kl"},
    }
    other = choose_recipe(Search(module, examples, 4, 3), replace(BASE, divergence="jsd"), parent)
    assert len(other["tried"]) == 5, "it was made of another recipe than is configured now"
    fallen = Version(route="r", recipe=recipe, gate={"candidate_acceptance": 0.9})
    assert len(choose_recipe(Search(module, examples, 4, 3), BASE, fallen)["tried"]) == 5
    first = Version(route="r", recipe={"origin": "first draft"}, gate={})
    found = choose_recipe(Search(module, examples, 4, 3), BASE, first)
    assert len(found["tried"]) == 5
    assert replace(BASE, **found["choice"]) == Recipe.of({**BASE.as_dict(), **found["choice"]})  # type: ignore[dict-item]


def test_fields_that_recipes_no_longer_have_are_ignored_in_stored_ones() -> None:
    """A version of an older release still hands its change on."""
    removed = {"warmup_steps": 4, "clip_norm": 1.0, "weight_decay": 0.0, "mask_weight": 0.5}
    change = {"follow_temperature": True}
    before = {**replace(BASE, follow_temperature=True).as_dict(), **removed}
    stored = {**before, "choice": change, "over": {"follow_temperature": False}}
    assert inherited_change(stored, BASE) == change
