"""Which recipe suits a route: what is configured, and a small search on the route's own signals, by successive halving.

DistillSpec (arXiv 2310.08461) finds that the best divergence and data depend on the task and on how it is decoded. So a
cycle may try a few recipes on part of its lessons, judge them on the rest of its lessons (never on the gate's exam),
and drop the worse half, until one is left beside the configured recipe. That one is changed where the other proves
itself better, not where it seems so: most recipes differ by less than a few dozen answers can tell, and by more in what
they cost. The choice stays with the version; its descendants keep it until the traffic has shifted.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from online.messages import MASKS, DrafterName
from online.settings import Settings
from online.signals import Signal
from online.tables import Version
from trainer.distill import Recipe, distill
from trainer.evaluation import evaluate
from trainer.gate import bootstrap_interval

# The configured recipe, and others that cost as much. What lost everywhere it was measured (LOG.md) is not tried anew.
CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {},
    {"divergence": "kl+acceptance"},
    {"follow_temperature": True},
)
JUDGED_SHARE = 4  # one lesson in so many judges the candidates
FIRST_SHARE = 4  # of the other lessons, one in so many is learnt from in the first round, twice as many in the next
FEWEST = 32  # lessons below which a search would be a draw of lots
SHIFTED = 0.8  # share of the promised acceptance below which the parent's choice is looked at again


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate in one round."""

    change: dict[str, Any]
    examples: int
    tokens_per_step: float


def configured_recipe(settings: Settings, route: str, seed: int) -> Recipe:
    """The recipe by which a route's drafts learn: the usual one, what its way to draft needs, and what is set.

    Raises:
        ValueError: a field or a value that recipes can't have.
    """
    drafting = settings.drafting(route)
    gamma = settings.gamma if drafting.gamma is None else drafting.gamma
    needed: dict[DrafterName, dict[str, int]] = {
        "parallel": {"masks": max(0, gamma - 1)},
        "parallel_cascade": {"masks": MASKS},
        "auto": {"masks": MASKS},
        "exits": {"exit_weight": 1},
    }
    return Recipe.of(
        {**needed.get(drafting.drafter or "chain", {}), **settings.recipe, "seed": seed}
    )


def choose_recipe(
    module: nn.Module,
    examples: Sequence[Signal],
    base: Recipe,
    parent: Version,
    gamma: int,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
    earlier_draft: nn.Module | None = None,
) -> dict[str, Any]:
    """For the new version: `choice`, what is changed in `base`; `over`, what it was; if looked for, the `tried`."""
    inherited = inherited_change(parent.recipe, base)
    promised = parent.gate.get("candidate_acceptance")
    if inherited is not None and not acceptance_fell(module, examples, promised, gamma, pad_id):
        return {"choice": inherited, "over": _over(inherited, base)}
    choice, tried = search(module, examples, base, gamma, pad_id, on_step, earlier_draft)
    return {"choice": choice, "over": _over(choice, base), "tried": [asdict(one) for one in tried]}


def inherited_change(recipe: Mapping[str, Any], base: Recipe) -> dict[str, Any] | None:
    """The choice in a version's recipe, where that was made of the recipe that is configured now."""
    choice = recipe.get("choice")
    if not isinstance(choice, Mapping):
        return None
    configured_recipe = {**recipe, **recipe.get("over", {}), "seed": base.seed}
    return dict(choice) if configured_recipe.items() >= base.as_dict().items() else None


def _over(choice: Mapping[str, Any], base: Recipe) -> dict[str, Any]:
    return {name: getattr(base, name) for name in choice}


def acceptance_fell(
    module: nn.Module, examples: Sequence[Signal], promised: float | None, gamma: int, pad_id: int
) -> bool:
    """Whether the active draft accepts much less on these lessons than the gate promised when it was made."""
    if promised is None:
        return True
    _, acceptance_R = evaluate(module, examples[:64], gamma, pad_id)
    return float(acceptance_R.mean()) < SHIFTED * promised


def search(
    module: nn.Module,
    examples: Sequence[Signal],
    base: Recipe,
    gamma: int,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
    earlier_draft: nn.Module | None = None,
) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The change to `base` that learns more from these lessons, if one does, and everything that was tried.

    `module` stays as it is. Costs a little less than training by `base` on all the lessons.
    """
    judges = [s for s in examples if _judges(s)]
    pupils = [s for s in examples if not _judges(s)]
    if len(pupils) < FEWEST or len(judges) < FEWEST // JUDGED_SHARE:
        return {}, ()
    base = replace(base, epochs=max(1, base.epochs // 2))  # enough to tell recipes apart
    tried: list[Trial] = []
    usual, *left = CANDIDATES
    count = max(FEWEST, len(pupils) // FIRST_SHARE)
    while True:
        marked = []
        for change in (usual, *left):
            learnt = copy.deepcopy(module)
            distill(
                learnt, [pupils[:count]], replace(base, **change), pad_id, on_step, earlier_draft
            )
            marked.append(evaluate(learnt, judges, gamma, pad_id).tokens_R)
            tried.append(Trial(dict(change), min(count, len(pupils)), float(marked[-1].mean())))
        if len(left) == 1:
            low, _ = bootstrap_interval(marked[1] - marked[0], base.seed)
            return dict(left[0] if low > 0 else usual), tuple(tried)
        order = sorted(range(len(left)), key=lambda i: -marked[i + 1].mean())
        left, count = [left[i] for i in order[: len(left) // 2]], 2 * count


def _judges(signal: Signal) -> bool:
    """By another byte of the hash than the one that holds requests out for the gate."""
    return hashlib.sha256(signal.origin.encode()).digest()[1] % JUDGED_SHARE == 0
