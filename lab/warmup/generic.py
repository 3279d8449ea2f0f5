"""`python -m lab g2sd`: a generic stage before the specific one, beside one stage of equal steps.

G2SD (arXiv 2302.14771): first the draft's features follow the target's through a projector, on
text of all domains; then its outputs follow on one domain. Beside it, at equal steps: outputs on
the one domain throughout, and outputs in both stages, which separates the effect of the features
from the effect of the mixed text.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lab import rig
from lab.options import option, parse
from lab.output import finish, say
from lab.warmup.answers import AnswerOptions, answers, tokenized, training_and_held_out
from lab.warmup.features import match_features
from lab.warmup.models import (
    Progress,
    load_model,
    pad_id,
    save_model,
    train,
    with_draft_from_target,
)
from lab.warmup.quality import compare, measure_quality
from online.signals import Signal
from trainer.batches import step_count
from trainer.evaluation import Evaluation
from trainer.recipe import Recipe

REFERENCE, OUTPUTS, FEATURES = "one stage", "outputs, outputs", "features, outputs"
SCHEMES = (REFERENCE, OUTPUTS, FEATURES)


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    generic: Path = option(help="prompts of all domains; as many as --prompts are used")
    layers: int | None = option(None, "begin with this many of the target's layers instead")
    epochs: int = option(4, "of each stage")
    seeds: int = option(3, "drafts of each scheme")
    out: Path | None = option(None, "folder for the draft of both stages, of the first seed")


def main() -> None:
    options = parse(Options, "g2sd", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            options, _ = with_draft_from_target(options, options.layers, Path(folder))
        finish(_run(options))


def _run(options: Options) -> dict[str, Any]:
    pair = rig.pair_of(options)
    draft = pair.files.draft
    specific, held_out = training_and_held_out(options, pair)
    prompts = tokenized(pair, options.generic, len(pair.prompts))
    generic = answers(pair, prompts, options.max_tokens, "generic")
    # As many of each, or the schemes would take different numbers of steps.
    count = min(len(specific), len(generic))
    say(f"{count} answers of each kind to learn from, {len(held_out)} held out")
    stages = Stages(load_model(pair.files.target), generic[:count], specific[:count])
    found: dict[str, list[Evaluation]] = {scheme: [] for scheme in SCHEMES}
    train_s = dict.fromkeys(SCHEMES, 0.0)
    for seed in range(options.seeds):
        for scheme in SCHEMES:
            module, started = load_model(draft), time.monotonic()
            stages.teach(scheme, module, Recipe(epochs=options.epochs, seed=seed, rehearsal=0))
            train_s[scheme] += (time.monotonic() - started) / options.seeds
            found[scheme].append(measure_quality(module, held_out))
            if options.out and seed == 0 and scheme == FEATURES:
                save_model(module, options.out, draft, pair.tokenizer)
    steps = 2 * step_count([specific[:count]], Recipe(epochs=options.epochs))
    figures = {"requests": len(held_out), "steps": steps, "seeds": options.seeds}
    before = measure_quality(load_model(draft), held_out)
    return {**figures, **compare(before, found), "train_s": train_s}


@dataclass(frozen=True)
class Stages:
    """The schemes that spend two stages."""

    target: nn.Module
    generic: Sequence[Signal]
    specific: Sequence[Signal]

    def teach(self, scheme: str, module: nn.Module, recipe: Recipe) -> None:
        """`recipe` is that of one stage. A single stage has one schedule of twice the epochs."""
        name = f"{scheme}, seed {recipe.seed}"
        if scheme == REFERENCE:
            train(name, module, self.specific, replace(recipe, epochs=2 * recipe.epochs))
            return
        if scheme == FEATURES:
            progress = Progress(f"{name}, features", step_count([self.generic], recipe))
            arguments = self.target, self.generic, recipe, pad_id(module), progress
            losses = match_features(module, *arguments)
            say(f"{name}: features' loss {losses[0]:.4f} to {losses[-1]:.4f}")
        else:
            train(f"{name}, generic", module, self.generic, recipe)
        train(f"{name}, specific", module, self.specific, recipe)
