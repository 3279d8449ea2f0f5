"""`python -m lab g2sd`: a generic stage before the specific one, beside one stage of as many steps.

G2SD (arXiv 2302.14771): first the draft's features follow the target's through a projector, on text of all domains;
then its outputs follow on one. Beside it, at equal steps: outputs on the one domain all the time, and outputs in both
stages, which tells what the features and what the mixed text did.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn
from transformers import AutoTokenizer

from lab import rig
from lab.warmup.answers import (
    Progress,
    add_arguments,
    answers,
    load_model,
    model_from_target,
    pad_id,
    save_model,
    say,
    stored_dtype,
    tokenized,
    train,
    training_and_held_out,
)
from lab.warmup.features import match_features
from lab.warmup.quality import Quality, difference, measure_quality
from online.signals import Signal
from trainer.batches import step_count
from trainer.recipe import Recipe

WAYS = ("one stage", "outputs, outputs", "features, outputs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab g2sd", description=__doc__)
    add_arguments(parser, prompt_count=200)
    parser.add_argument(
        "--generic",
        type=Path,
        required=True,
        help="prompts of all domains; as many as --prompts are used",
    )
    parser.add_argument(
        "--layers", type=int, help="begin with so many of the target's layers instead of the draft"
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each stage")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="folder for the draft of both stages, of the first seed"
    )
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            target = rig.files_of(args).target
            model_from_target(
                target, args.layers, Path(folder), AutoTokenizer.from_pretrained(target)
            )
            args.draft = folder
        print(json.dumps(_run(args)))


def _run(args: argparse.Namespace) -> dict[str, object]:
    pair = rig.pair_of(args)
    specific, exam = training_and_held_out(args, pair)
    generic = answers(
        pair, tokenized(pair, args.generic, len(pair.prompts)), args.max_tokens, "generic"
    )
    count = min(
        len(specific), len(generic)
    )  # as many of each, or the ways would not take as many steps
    say(f"{count} answers of each kind to learn from, {len(exam)} to judge by")
    stages = Stages(load_model(pair.files.target), generic[:count], specific[:count])
    marks: dict[str, list[Quality]] = {way: [] for way in WAYS}
    seconds = dict.fromkeys(WAYS, 0.0)
    for seed in range(args.seeds):
        for way in WAYS:
            module, started = load_model(pair.files.draft), time.monotonic()
            stages.teach(way, module, Recipe(epochs=args.epochs, seed=seed, rehearsal=0))
            seconds[way] += time.monotonic() - started
            marks[way].append(measure_quality(module, exam))
            if args.out and seed == 0 and way == WAYS[-1]:
                save_model(module, args.out, stored_dtype(pair.files.draft), pair.tokenizer)
    before = measure_quality(load_model(pair.files.draft), exam)
    return _report(
        before, marks, seconds, 2 * step_count([specific[:count]], Recipe(epochs=args.epochs))
    )


class Stages:
    """The ways to spend two stages."""

    def __init__(
        self, target: nn.Module, generic: Sequence[Signal], specific: Sequence[Signal]
    ) -> None:
        self._target, self._generic, self._specific = target, generic, specific

    def teach(self, way: str, module: nn.Module, recipe: Recipe) -> None:
        """`recipe` is of one stage. One stage alone has one schedule of twice the epochs."""
        name = f"{way}, seed {recipe.seed}"
        if way == "one stage":
            train(name, module, self._specific, replace(recipe, epochs=2 * recipe.epochs))
            return
        if way == "features, outputs":
            progress: Callable[[], None] = Progress(
                f"{name}, features", step_count([self._generic], recipe)
            )
            told = match_features(
                module, self._target, self._generic, recipe, pad_id(module), progress
            )
            say(f"{name}: features' loss {told[0]:.4f} to {told[-1]:.4f}")
        else:
            train(f"{name}, generic", module, self._generic, recipe)
        train(f"{name}, specific", module, self._specific, recipe)


def _report(
    before: Quality, marks: dict[str, list[Quality]], seconds: dict[str, float], steps: int
) -> dict[str, object]:
    mean = {way: Quality.mean(of_way) for way, of_way in marks.items()}
    against = {way: difference(mean[way].tokens_R, mean[WAYS[0]].tokens_R) for way in WAYS[1:]}
    print(
        f"\n{'':20} {'tokens a step':>14} {'acceptance':>11} {'KL':>6} {'training s':>11}  per seed"
    )
    print(f"{'before':20} {before.row}")
    for way, own in mean.items():
        seeds = [round(float(one.tokens_R.mean()), 3) for one in marks[way]]
        print(f"{way:20} {own.row} {seconds[way] / len(seeds):11.0f}  {seeds}")
    for way, found in against.items():
        print(f"{way} over {WAYS[0]}: {found} tokens a step")
    return {
        "requests": len(before.tokens_R),
        "steps": steps,
        "seeds": len(marks[WAYS[0]]),
        "tokens_per_step": {"before": before.step, **{way: own.step for way, own in mean.items()}},
        "acceptance": {way: round(float(own.acceptance_R.mean()), 3) for way, own in mean.items()},
        "over_one_stage": {way: found.figures for way, found in against.items()},
        "train_s": {way: round(spent / len(marks[way]), 1) for way, spent in seconds.items()},
    }


if __name__ == "__main__":
    main()
