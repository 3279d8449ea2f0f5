"""`python -m lab g2sd`: a generic stage before the specific one, beside one stage of equal steps.

G2SD (arXiv 2302.14771): first the draft's features follow the target's
through a projector, on text of all domains; then its outputs follow on one
domain. Beside it, at equal steps: outputs on the one domain throughout, and
outputs in both stages, which separates the effect of the features from that
of the mixed text.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer

from lab import rig
from lab.warmup.answers import answers, tokenized, training_and_held_out
from lab.warmup.features import match_features
from lab.warmup.models import (
    Progress,
    load_model,
    model_from_target,
    pad_id,
    save_model,
    train,
)
from lab.warmup.options import add, add_held_out, parser, say
from lab.warmup.quality import HEADER, Difference, Quality, measure_quality
from online.signals import Signal
from trainer.batches import step_count
from trainer.recipe import Recipe

REFERENCE, OUTPUTS, FEATURES = "one stage", "outputs, outputs", "features, outputs"
SCHEMES = (REFERENCE, OUTPUTS, FEATURES)


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            target = rig.files_of(args).target
            tokenizer = AutoTokenizer.from_pretrained(target)
            model_from_target(target, args.layers, Path(folder), tokenizer)
            args.draft = folder
        print(json.dumps(_run(args)))


def _arguments() -> argparse.Namespace:
    options = parser("g2sd", __doc__, prompt_count=200)
    add_held_out(options)
    generic = "prompts of all domains; as many as --prompts are used"
    options.add_argument("--generic", type=Path, required=True, help=generic)
    layers = "begin with this many of the target's layers instead of the draft"
    options.add_argument("--layers", type=int, help=layers)
    add(options, epochs=(4, "of each stage"), seeds=(3, ""))
    out = "folder for the draft of both stages, of the first seed"
    options.add_argument("--out", type=Path, help=out)
    return options.parse_args()


def _run(args: argparse.Namespace) -> dict[str, object]:
    pair = rig.pair_of(args)
    draft = pair.files.draft
    specific, held_out = training_and_held_out(args, pair)
    prompts = tokenized(pair, args.generic, len(pair.prompts))
    generic = answers(pair, prompts, args.max_tokens, "generic")
    # As many of each, or the schemes would take different numbers of steps.
    count = min(len(specific), len(generic))
    say(f"{count} answers of each kind to learn from, {len(held_out)} to judge by")
    stages = Stages(load_model(pair.files.target), generic[:count], specific[:count])
    found: dict[str, list[Quality]] = {scheme: [] for scheme in SCHEMES}
    seconds = dict.fromkeys(SCHEMES, 0.0)
    for seed in range(args.seeds):
        for scheme in SCHEMES:
            module, started = load_model(draft), time.monotonic()
            stages.teach(scheme, module, Recipe(epochs=args.epochs, seed=seed, rehearsal=0))
            seconds[scheme] += time.monotonic() - started
            found[scheme].append(measure_quality(module, held_out))
            if args.out and seed == 0 and scheme == FEATURES:
                save_model(module, args.out, draft, pair.tokenizer)
    before = measure_quality(load_model(draft), held_out)
    steps = 2 * step_count([specific[:count]], Recipe(epochs=args.epochs))
    figures = {"requests": len(held_out), "steps": steps, "seeds": args.seeds}
    return {**figures, **_report(before, found, seconds)}


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


def _report(
    before: Quality, found: dict[str, list[Quality]], seconds: dict[str, float]
) -> dict[str, object]:
    print(f"\n{'':20} {HEADER} {'training s':>11}  per seed")
    print(f"{'before':20} {before.columns}")
    mean, train_s = {}, {}
    for scheme, by_seed in found.items():
        mean[scheme] = Quality.mean(by_seed)
        train_s[scheme] = seconds[scheme] / len(by_seed)
        seeds = [quality.tokens_per_step for quality in by_seed]
        print(f"{scheme:20} {mean[scheme].columns} {train_s[scheme]:11.0f}  {seeds}")
    over = {}
    for scheme in (OUTPUTS, FEATURES):
        difference = Difference.of(mean[scheme].tokens_R, mean[REFERENCE].tokens_R)
        print(f"{scheme} over {REFERENCE}: {difference} tokens a step")
        over[scheme] = difference.figures
    tokens = {scheme: quality.tokens_per_step for scheme, quality in mean.items()}
    return {
        "tokens_per_step": {"before": before.tokens_per_step, **tokens},
        "acceptance": {scheme: quality.acceptance for scheme, quality in mean.items()},
        "over_one_stage": over,
        "train_s": {scheme: round(each, 1) for scheme, each in train_s.items()},
    }


if __name__ == "__main__":
    main()
