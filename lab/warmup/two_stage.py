"""`python -m lab two-stage`: first a smaller target from a larger one, then a draft for it.

DistillSpec (arXiv 2310.08461): if a smaller target is enough, distil it
from the larger one for quality, then a draft from it for speed. The smaller
target begins with some of the teacher's layers and learns from the
teacher's answers. A draft learns from its answers, and beside it one from
the teacher's. The cost: the smaller target's distance from the teacher on
held-out requests. The gain: tokens per second, measured in turns through
the engine.

A third draft learns from the answers of both, for as many steps as one of
the others: can one draft serve both targets (S2D, arXiv 2407.01955)?
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoConfig

from decoder.models.loading import ModelFiles
from lab import rig
from lab.bench.system_process import SystemProcess
from lab.bench.systems import Case, Ours, Outcome
from lab.statistics import median_ratio
from lab.warmup.answers import answers, training_and_held_out
from lab.warmup.models import load_model, model_from_target, save_model, train
from lab.warmup.options import add, add_held_out, parser, say
from lab.warmup.quality import Difference, Quality, measure_quality
from online.signals import Signal
from trainer.recipe import Recipe

PLAIN, DRAFTED = Case("plain"), Case("with a draft", drafts=True)
CONTESTANTS = [(who, case) for who in ("teacher", "smaller") for case in (PLAIN, DRAFTED)]
OWN_DRAFTS = {"teacher": "teachers-draft", "smaller": "draft"}
Speeds = dict[tuple[str, str], list[Outcome]]


def main() -> None:
    args = _arguments()
    pair = rig.pair_of(args)
    files = ModelFiles(str(args.out / "target"), pair.files.draft, "smaller")
    smaller = replace(pair, files=files)
    signals, held_out = training_and_held_out(args, pair)
    quality = _first_stage(args, pair, signals, held_out)
    recipe = Recipe(epochs=args.epochs)
    _draft("the teacher's draft", pair, signals, recipe, args.out / "teachers-draft")
    prompts = [signal.prompt_ids.tolist() for signal in [*signals, *held_out]]
    answered = answers(smaller, prompts, args.max_tokens, "s")
    ids = {f"s{i}" for i in range(len(signals))}
    own = [s for s in answered if s.request_id in ids]
    own_held_out = [s for s in answered if s.request_id not in ids]
    _draft("its draft", smaller, own, recipe, args.out / "draft")
    half = replace(recipe, epochs=max(1, args.epochs // 2))
    _draft("one draft for both", pair, [*signals, *own], half, args.out / "common-draft")
    drafts = _drafts(args.out, {"teacher": held_out, "smaller": own_held_out})
    figures = {**quality, "drafts": drafts}
    if args.repetitions:
        speeds = _speeds(args, pair, smaller, prompts[len(signals) :])
        figures["speed_over_teacher_plain"] = speed_table(speeds)
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    options = parser("two-stage", __doc__, prompt_count=400)
    add_held_out(options)
    out = "folder for the smaller target/ and three drafts"
    options.add_argument("--out", type=Path, required=True, help=out)
    layers = "of the smaller target (default: half of the teacher's)"
    options.add_argument("--layers", type=int, default=0, help=layers)
    add(
        options,
        epochs=(Recipe().epochs, ""),
        target_rate=(1e-3, "learning rate of the smaller target"),
        repetitions=(7, "of the comparison of speeds; 0: none"),
        alone=(12, "prompts of a turn, one after another"),
    )
    return options.parse_args()


def _first_stage(
    args: argparse.Namespace, pair: rig.Pair, signals: list[Signal], held_out: list[Signal]
) -> dict[str, object]:
    """Makes the smaller target; its distance from the teacher before and after distillation."""
    folder, teacher = args.out / "target", pair.files.target
    layers = AutoConfig.from_pretrained(teacher).num_hidden_layers
    kept = model_from_target(teacher, args.layers or layers // 2, folder, pair.tokenizer)
    say(f"the smaller target has layers {kept} of {layers}; {len(signals)} answers to learn from")
    module = load_model(folder)
    before = measure_quality(module, held_out)
    # A few layers have nothing worth rehearsing.
    recipe = Recipe(epochs=args.epochs, learning_rate=args.target_rate, rehearsal=0)
    train("the smaller target", module, signals, recipe)
    save_model(module, folder, teacher, pair.tokenizer)
    after = measure_quality(load_model(folder), held_out)
    agreement = "Σ min(p, q), or same first choice"
    print(f"\n{'smaller target':20} {'KL to the teacher':>18} {agreement:>34}")
    for what, quality in (("its layers alone", before), ("distilled", after)):
        print(f"{what:20} {quality.kl_R.mean():18.3f} {quality.acceptance_R.mean():34.3f}")
    closer = Difference.of(after.kl_R, before.kl_R)
    requests = len(held_out)
    print(f"KL: {closer} nats by distillation, on {requests} held-out requests\n", flush=True)
    return {
        "layers": kept,
        "requests": requests,
        "kl": {"before": before.kl, "after": _with_interval(after)},
        "kl_gained": closer.figures,
        "agreement": {"before": before.acceptance, "after": after.acceptance},
    }


def _with_interval(quality: Quality) -> list[float]:
    return Difference.of(quality.kl_R, np.zeros_like(quality.kl_R)).figures


def _draft(
    what: str, pair: rig.Pair, signals: Sequence[Signal], recipe: Recipe, folder: Path
) -> None:
    module = load_model(pair.files.draft)
    train(what, module, signals, recipe)
    save_model(module, folder, pair.files.draft, pair.tokenizer)


def _drafts(out: Path, held_out: dict[str, list[Signal]]) -> dict[str, dict[str, object]]:
    """Prints and returns how each target's own draft and the common one compare."""
    columns = f"{'τ of its own draft':>18} {'acceptance':>10} {'of the common one':>18}"
    print(f"\n{'':10} {columns}  difference (95 %)")
    found: dict[str, dict[str, object]] = {}
    for who, signals in held_out.items():
        own = measure_quality(load_model(out / OWN_DRAFTS[who]), signals)
        common = measure_quality(load_model(out / "common-draft"), signals)
        gain = Difference.of(common.tokens_R, own.tokens_R)
        tokens, shared = own.tokens_per_step, common.tokens_per_step
        print(f"{who:10} {tokens:18} {own.acceptance:10} {shared:18}  {gain}", flush=True)
        found[who] = {
            "acceptance": own.acceptance,
            "tokens_per_step": tokens,
            "common_tokens_per_step": shared,
            "common_gain": gain.figures,
        }
    return found


def _speeds(
    args: argparse.Namespace, teacher: rig.Pair, smaller: rig.Pair, prompts: list[list[int]]
) -> Speeds:
    """Systems run in random order; the first repetition warms up."""
    pairs = {"teacher": teacher, "smaller": smaller}
    systems = {
        who: SystemProcess(Ours, pair, args.max_tokens, str(args.out / OWN_DRAFTS[who]), 1)
        for who, pair in pairs.items()
    }
    rng = random.Random(0)
    found: Speeds = {(who, case.name): [] for who, case in CONTESTANTS}
    try:
        for repetition in range(-1, args.repetitions):
            at = (repetition + 1) * args.alone
            dealt = [prompts[(at + i) % len(prompts)] for i in range(args.alone)]
            for who, case in rng.sample(CONTESTANTS, len(CONTESTANTS)):
                outcome = systems[who].run(case, dealt, seed=at)
                if repetition >= 0:
                    found[who, case.name].append(outcome)
            say(f"repetition {repetition + 1} of {args.repetitions}")
    finally:
        for system in systems.values():
            system.close()
    return found


def speed_table(speeds: Speeds) -> dict[str, list[float]]:
    """Prints speeds; returns each one's ratio to the plain teacher, with its interval."""
    per_s = {key: np.array([o.tokens / o.seconds for o in own]) for key, own in speeds.items()}
    ratios: dict[str, list[float]] = {}
    print(f"\n{'':26} {'tokens/s':>9} {'τ':>5} {'over the teacher, plain (95 %)':>31}")
    for key, own in per_s.items():
        name, outcomes = ", ".join(key), speeds[key]
        ratio = median_ratio(own / per_s["teacher", PLAIN.name])
        tau = sum(o.tokens for o in outcomes) / sum(o.steps for o in outcomes)
        ratios[name] = [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)]
        spread = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        print(f"{name:26} {np.median(own):9.0f} {tau:5.2f} {spread:>31}")
    return ratios


if __name__ == "__main__":
    main()
