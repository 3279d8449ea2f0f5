"""The recipe of a route: the configured one, and a small search on the route's own signals.

DistillSpec (arXiv 2310.08461) finds that the best divergence and data
depend on the task and on how it is decoded. So a cycle may try a few
recipes on part of its examples, validate them on the other examples (never
on the gate's held-out set), and drop the worse half until one is left
beside the configured recipe. That one wins only if it is proven better:
most recipes differ by less than a few dozen answers can show. The change is
stored with the version; its descendants keep it until the traffic shifts.

Legend: R requests.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from online.drafters import Teaching
from online.settings import Settings
from online.signals import Signal
from online.tables import Version
from trainer.distill import distill
from trainer.divergences import searched_names
from trainer.evaluation import evaluate
from trainer.intervals import Floats, bootstrap_interval
from trainer.recipe import Recipe

Change = Mapping[str, Any]

# The configured recipe, and others of equal cost. Recipes that lost everywhere are not searched.
CANDIDATES: tuple[Change, ...] = (
    {},
    *({"divergence": name} for name in searched_names()),
    {"follow_temperature": True},
)
VALIDATION_EVERY = 4  # one example in four validates the candidates
FIRST_ROUND_SHARE = 4  # the first round trains on a quarter of the others; each round doubles it
MIN_EXAMPLES = 32  # with fewer a search is a lottery
FALLEN_SHARE = 0.8  # of the promised acceptance; below it the inherited change is searched anew
CHECKED = 64  # examples that measure the active draft's acceptance


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate in one round."""

    change: dict[str, Any]
    lessons: int  # examples; the name is part of stored recipes
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Search:
    """The inputs that all candidates share."""

    module: nn.Module  # the parent; the search leaves it unchanged
    examples: Sequence[Signal]
    gamma: int
    pad_id: int
    on_step: Callable[[], None] = lambda: None
    earlier_draft: nn.Module | None = None


def configured_recipe(settings: Settings, teaching: Teaching, seed: int) -> Recipe:
    """The default recipe, with the needs of the route's drafter, then the configured fields.

    Raises:
        ValueError: names a field that recipes do not have, or an invalid value.
    """
    return Recipe.of({**teaching, **settings.recipe, "seed": seed})


def choose_recipe(search: Search, base: Recipe, parent: Version) -> dict[str, Any]:
    """What the new version stores: `choice`, the change to `base`, and `over`, what it replaces.

    After a search also `tried`, its trials.
    """
    inherited = inherited_change(parent.recipe, base)
    promised = parent.gate.get("candidate_acceptance")
    if inherited is not None and not acceptance_fell(search, promised):
        return {"choice": inherited, "over": _replaced(inherited, base)}
    choice, trials = run_search(search, base)
    tried = [asdict(trial) for trial in trials]
    return {"choice": choice, "over": _replaced(choice, base), "tried": tried}


def inherited_change(stored: Mapping[str, Any], base: Recipe) -> dict[str, Any] | None:
    """The change in a version's recipe; None if it changed another recipe than `base`.

    Fields of older recipes that no longer exist are ignored.
    """
    choice = stored.get("choice")
    if not isinstance(choice, Mapping):
        return None
    before = {**stored, **stored.get("over", {}), "seed": base.seed}
    return dict(choice) if before.items() >= base.as_dict().items() else None


def _replaced(choice: Change, base: Recipe) -> dict[str, Any]:
    return {name: getattr(base, name) for name in choice}


def acceptance_fell(search: Search, promised: float | None) -> bool:
    """Whether the active draft's acceptance is far below what the gate measured when it passed."""
    if promised is None:
        return True
    checked = search.examples[:CHECKED]
    _, acceptance_R = evaluate(search.module, checked, search.gamma, search.pad_id)
    return float(acceptance_R.mean()) < FALLEN_SHARE * promised


def run_search(search: Search, base: Recipe) -> tuple[dict[str, Any], tuple[Trial, ...]]:
    """The change to `base` that is proven better, or none, and all trials.

    Costs a little less than training by `base` on all the examples.
    """
    validation = [s for s in search.examples if _validates(s)]
    training = [s for s in search.examples if not _validates(s)]
    if len(training) < MIN_EXAMPLES or len(validation) < MIN_EXAMPLES // VALIDATION_EVERY:
        return {}, ()
    base = replace(base, epochs=max(1, base.epochs // 2))  # enough to tell recipes apart
    trials: list[Trial] = []
    usual, *left = CANDIDATES
    count = max(MIN_EXAMPLES, len(training) // FIRST_ROUND_SHARE)
    while True:
        taken = training[:count]
        results = []
        for change in (usual, *left):
            tokens_R = _try(search, replace(base, **change), taken, validation)
            results.append(tokens_R)
            trials.append(Trial(dict(change), len(taken), float(tokens_R.mean())))
        if len(left) == 1:
            low, _ = bootstrap_interval(results[1] - results[0], base.seed)
            return dict(left[0] if low > 0 else usual), tuple(trials)
        order = sorted(range(len(left)), key=lambda i: -results[i + 1].mean())
        left = [left[i] for i in order[: len(left) // 2]]
        count *= 2


def _try(
    search: Search,
    recipe: Recipe,
    training: Sequence[Signal],
    validation: Sequence[Signal],
) -> Floats:
    """Trains a copy of the parent; its expected tokens per step on each validation answer [R]."""
    trained = copy.deepcopy(search.module)
    distill(
        trained,
        [training],
        recipe,
        search.pad_id,
        search.on_step,
        search.earlier_draft,
    )
    return evaluate(trained, validation, search.gamma, search.pad_id).tokens_R


def _validates(signal: Signal) -> bool:
    """Uses another byte of the hash than the split that holds requests out for the gate."""
    return hashlib.sha256(signal.origin.encode()).digest()[1] % VALIDATION_EVERY == 0
