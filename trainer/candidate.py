"""A cycle's candidate: trained from its claim, published, and compared by the gate."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trainer.claim import Claim
from trainer.context import CycleContext
from trainer.distill import Distilled, distill
from trainer.evaluation import served_gamma
from trainer.gate import GateReport, compare_drafts, json_ready
from trainer.recipe_search import Search, choose_recipe
from trainer.training_plan import TrainingPlan


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """A published candidate."""

    digest: str
    recipe: dict[str, Any]  # as the version stores it, with the search's trials
    gamma: int  # the γ to compare it at
    distilled: Distilled
    train_s: float


def train_draft(
    context: CycleContext,
    claim: Claim,
    plan: TrainingPlan,
    check_lease: Callable[[], None],
) -> TrainedDraft:
    """Chooses the recipe, trains the parent's weights by it, and publishes them."""
    started = time.monotonic()
    module, recipe, pad_id = claim.module, claim.recipe, claim.pad_id
    gamma = served_gamma(plan.held_out.new, context.settings.gamma or 1)
    # Rehearsing the parent alone would let each version forget a little more.
    first = context.weights.first(claim.route) if recipe.rehearsal else None
    searched: dict[str, Any] = {}
    if context.settings.search_recipe:
        search = Search(module, plan.passes[0], gamma, pad_id, check_lease, first)
        searched = choose_recipe(search, recipe, claim.parent)
        recipe = replace(recipe, **searched["choice"])
    distilled = distill(module, plan.passes, recipe, pad_id, check_lease, first)
    train_s = time.monotonic() - started
    save = context.weights.save
    digest = context.artifacts.publish(lambda folder: save(module, claim.parent, folder))
    counts = {"steps": distilled.steps, "positions": distilled.positions}
    stored = json_ready({**recipe.as_dict(), **searched, **counts})
    return TrainedDraft(digest, stored, gamma, distilled, train_s)


def run_gate(
    context: CycleContext, claim: Claim, plan: TrainingPlan, trained: TrainedDraft
) -> GateReport:
    """Compares the candidate as served: in its stored precision, read back from disk."""
    return compare_drafts(
        context.weights.load(claim.parent),
        context.weights.read(trained.digest),
        plan.held_out.new,
        plan.held_out.earlier,
        gamma=trained.gamma,
        pad_id=claim.pad_id,
        tolerance=context.settings.forgetting_tolerance,
        seed=claim.lease.cycle_id,
    )
