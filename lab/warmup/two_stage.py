"""`python -m lab two-stage`: first a smaller target from a larger one, then a draft for the smaller.

DistillSpec (arXiv 2310.08461): where a smaller target does, distil it from the larger one for quality, then the draft
from it for speed. The smaller target begins with some of the teacher's layers and learns from the teacher's answers; a
draft learns from its answers, and beside it one from the teacher's. What it costs: the smaller target's distance from
the teacher on held-out requests. What it gains: tokens per second, by turns through the engine.

Beside these two a third draft learns from the answers of both, for as long as one of them: may one draft serve both
(S2D, arXiv 2407.01955)?
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers

from decoder.models.loading import ModelFiles
from lab import rig
from lab.bench.contestants import Case, Contestant, Ours, Outcome
from lab.statistics import median_ratio
from lab.warmup.answers import (
    add_arguments,
    answers,
    load_model,
    model_from_target,
    save_model,
    say,
    stored_dtype,
    train,
    training_and_held_out,
)
from lab.warmup.quality import Quality, difference, measure_quality
from online.signals import Signal
from trainer.recipe import Recipe

PLAIN, DRAFTED = Case("plain"), Case("with a draft", drafts=True)
CONTESTANTS = [(who, case) for who in ("teacher", "smaller") for case in (PLAIN, DRAFTED)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab two-stage", description=__doc__)
    add_arguments(parser, prompt_count=400)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the smaller target/ and three drafts"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="of the smaller target (default: half of the teacher's)",
    )
    parser.add_argument("--epochs", type=int, default=Recipe().epochs)
    parser.add_argument(
        "--target-rate", type=float, default=1e-3, help="learning rate of the smaller target"
    )
    parser.add_argument(
        "--repetitions", type=int, default=7, help="of the comparison of speeds; 0: none"
    )
    parser.add_argument(
        "--alone", type=int, default=12, help="prompts of a turn, one after another"
    )
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    pair = rig.pair_of(args)
    smaller = replace(pair, files=ModelFiles(str(args.out / "target"), pair.files.draft, "smaller"))
    examples, exam = training_and_held_out(args, pair)
    quality = _first_stage(args, pair, examples, exam)
    recipe = Recipe(epochs=args.epochs)
    _draft("the teacher's draft", pair, examples, recipe, args.out / "teachers-draft")
    told = answers(
        smaller, [s.prompt_ids.tolist() for s in [*examples, *exam]], args.max_tokens, "s"
    )
    first = {f"s{i}" for i in range(len(examples))}
    own, own_exam = (
        [s for s in told if s.request_id in first],
        [s for s in told if s.request_id not in first],
    )
    _draft("its draft", smaller, own, recipe, args.out / "draft")
    half = replace(recipe, epochs=max(1, args.epochs // 2))
    _draft("one draft for both", pair, [*examples, *own], half, args.out / "common-draft")
    figures = {**quality, "drafts": _drafts(args.out, {"teacher": exam, "smaller": own_exam})}
    if args.repetitions:
        figures["speed_over_teacher_plain"] = speed_table(
            _speeds(args, pair, smaller, [s.prompt_ids.tolist() for s in exam])
        )
    print(json.dumps(figures))


def _first_stage(
    args: argparse.Namespace, pair: rig.Pair, examples: list[Signal], exam: list[Signal]
) -> dict[str, object]:
    """Makes the smaller target, and says how far it is from the teacher before and after it has learnt."""
    folder = args.out / "target"
    teacher = transformers.AutoConfig.from_pretrained(pair.files.target).num_hidden_layers
    kept = model_from_target(pair.files.target, args.layers or teacher // 2, folder, pair.tokenizer)
    say(f"the smaller target has layers {kept} of {teacher}; {len(examples)} answers to learn from")
    module = load_model(folder)
    before = measure_quality(module, exam)
    recipe = Recipe(
        epochs=args.epochs, learning_rate=args.target_rate, rehearsal=0
    )  # it begins knowing nothing
    train("the smaller target", module, examples, recipe)
    save_model(module, folder, stored_dtype(pair.files.target), pair.tokenizer)
    after = measure_quality(load_model(folder), exam)
    print(
        f"\n{'smaller target':20} {'KL to the teacher':>18} {'Σ min(p, q), or same first choice':>34}"
    )
    for what, marks in (("its layers alone", before), ("distilled", after)):
        print(f"{what:20} {marks.kl_R.mean():18.3f} {marks.acceptance_R.mean():34.3f}")
    closer = difference(after.kl_R, before.kl_R)
    print(f"KL: {closer} nats by distillation, on {len(exam)} held-out requests\n", flush=True)
    return {
        "layers": kept,
        "requests": len(exam),
        "kl": {"before": round(float(before.kl_R.mean()), 3), "after": _with_interval(after)},
        "kl_gained": closer.figures,
        "agreement": {
            "before": round(float(before.acceptance_R.mean()), 3),
            "after": round(float(after.acceptance_R.mean()), 3),
        },
    }


def _drafts(out: Path, exams: dict[str, list[Signal]]) -> dict[str, dict[str, object]]:
    """Prints what each target keeps of its own draft's tokens and of the common one's."""
    folders, found = {"teacher": "teachers-draft", "smaller": "draft"}, {}
    print(
        f"\n{'':10} {'τ of its own draft':>18} {'acceptance':>10} {'of the common one':>18}  difference (95 %)"
    )
    for who, exam in exams.items():
        own, common = (
            measure_quality(load_model(out / folder), exam)
            for folder in (folders[who], "common-draft")
        )
        less = difference(common.tokens_R, own.tokens_R)
        acceptance = round(float(own.acceptance_R.mean()), 3)
        print(f"{who:10} {own.step:18} {acceptance:10} {common.step:18}  {less}", flush=True)
        found[who] = {
            "acceptance": acceptance,
            "tokens_per_step": own.step,
            "common_tokens_per_step": common.step,
            "common_gain": less.figures,
        }
    return found


def _with_interval(marks: Quality) -> list[float]:
    return difference(marks.kl_R, np.zeros_like(marks.kl_R)).figures


def _draft(what: str, pair: rig.Pair, examples: list[Signal], recipe: Recipe, folder: Path) -> None:
    module = load_model(pair.files.draft)
    train(what, module, examples, recipe)
    save_model(module, folder, stored_dtype(pair.files.draft), pair.tokenizer)


def _speeds(
    args: argparse.Namespace, teacher: rig.Pair, smaller: rig.Pair, prompts: list[list[int]]
) -> dict[tuple[str, str], list[Outcome]]:
    """Who is compared takes turns in random order; the first repetition warms everyone up."""
    contestants = {
        "teacher": Contestant(Ours, teacher, args.max_tokens, str(args.out / "teachers-draft"), 1),
        "smaller": Contestant(Ours, smaller, args.max_tokens, str(args.out / "draft"), 1),
    }
    rng, found = random.Random(0), {(who, case.name): [] for who, case in CONTESTANTS}
    try:
        for repetition in range(-1, args.repetitions):
            at = (repetition + 1) * args.alone
            dealt = [prompts[(at + i) % len(prompts)] for i in range(args.alone)]
            for who, case in rng.sample(CONTESTANTS, len(CONTESTANTS)):
                outcome = contestants[who].run(case, dealt, seed=at)
                if repetition >= 0:
                    found[who, case.name].append(outcome)
            say(f"repetition {repetition + 1} of {args.repetitions}")
    finally:
        for contestant in contestants.values():
            contestant.close()
    return found


def speed_table(speeds: dict[tuple[str, str], list[Outcome]]) -> dict[str, list[float]]:
    """Prints who is how fast; each one's ratio to the plain teacher, with its interval."""
    per_s = {
        key: np.array([o.tokens / o.seconds for o in outcomes]) for key, outcomes in speeds.items()
    }
    ratios: dict[str, list[float]] = {}
    print(f"\n{'':26} {'tokens/s':>9} {'τ':>5} {'over the teacher, plain (95 %)':>31}")
    for (who, way), own in per_s.items():
        ratio = median_ratio(own / per_s["teacher", PLAIN.name])
        tau = sum(o.tokens for o in speeds[who, way]) / sum(o.steps for o in speeds[who, way])
        ratios[f"{who}, {way}"] = [
            round(value, 3) for value in (ratio.value, ratio.low, ratio.high)
        ]
        spread = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        print(f"{who + ', ' + way:26} {np.median(own):9.0f} {tau:5.2f} {spread:>31}")
    return ratios


if __name__ == "__main__":
    main()
