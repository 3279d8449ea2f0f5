"""`python -m lab two-stage`: first a smaller target from a larger one, then a draft for it.

DistillSpec (arXiv 2310.08461): if a smaller target is enough, distil it from the larger one for
quality, then a draft from it for speed. The smaller target begins with some of the teacher's
layers and learns from the teacher's answers. One draft learns from the smaller target's answers,
another from the teacher's. The cost is the smaller target's distance from the teacher on held-out
requests. The gain is in tokens per second, measured through the engine.

A third draft learns from the answers of both, for as many steps as one of the others: can one
draft serve both targets (S2D, arXiv 2407.01955)?
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from decoder.models.loading import ModelFiles
from lab import rig
from lab.bench.system_process import measure, over, show
from lab.bench.systems import Case, Ours
from lab.options import option, parse
from lab.output import finish, say, table
from lab.statistics import paired_difference
from lab.warmup.answers import AnswerOptions, answers, training_and_held_out
from lab.warmup.models import load_model, model_from_target, save_model, train
from lab.warmup.quality import kl_from_target, measure_quality
from online.signals import Signal
from trainer.recipe import Recipe

OWN_DRAFTS = {"teacher": "teachers-draft", "smaller": "draft"}
REFERENCE = "teacher, plain"
CONTESTANTS = [
    (who, Case(f"{who}, {name}", drafts=drafts))
    for who in OWN_DRAFTS
    for name, drafts in (("plain", False), ("with a draft", True))
]


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    prompt_count: int = option(400, "prompts taken from the file")
    out: Path = option(help="folder for the smaller target/ and three drafts")
    layers: int = option(0, "of the smaller target (default: half of the teacher's)")
    epochs: int = option(Recipe().epochs, "over the answers")
    target_rate: float = option(1e-3, "learning rate of the smaller target")
    repetitions: int = option(7, "of the comparison of speeds; 0: none")
    alone: int = option(12, "prompts of a repetition, one after another")


def main() -> None:
    options = parse(Options, "two-stage", __doc__)
    pair, out = rig.pair_of(options), options.out
    files = ModelFiles(str(out / "target"), pair.files.draft, "smaller")
    smaller = replace(pair, files=files)
    signals, held_out = training_and_held_out(options, pair)
    figures = _smaller_target(options, pair, signals, held_out)
    recipe = Recipe(epochs=options.epochs)
    _draft("the teacher's draft", pair, signals, recipe, out / OWN_DRAFTS["teacher"])
    prompts = [signal.prompt_ids.tolist() for signal in [*signals, *held_out]]
    answered = answers(smaller, prompts, options.max_tokens, "s")
    ids = {f"s{i}" for i in range(len(signals))}
    own = [s for s in answered if s.request_id in ids]
    own_held_out = [s for s in answered if s.request_id not in ids]
    _draft("its draft", smaller, own, recipe, out / OWN_DRAFTS["smaller"])
    half = replace(recipe, epochs=max(1, options.epochs // 2))
    _draft("one draft for both", pair, [*signals, *own], half, out / "common-draft")
    figures["drafts"] = _drafts(out, {"teacher": held_out, "smaller": own_held_out})
    if options.repetitions:
        pairs = {"teacher": pair, "smaller": smaller}
        figures["speed_over_teacher_plain"] = _speeds(options, pairs, prompts[len(signals) :])
    finish(figures)


def _smaller_target(
    options: Options, pair: rig.Pair, signals: list[Signal], held_out: list[Signal]
) -> dict[str, Any]:
    """Makes the smaller target; its distance from the teacher before and after distillation."""
    folder, teacher = options.out / "target", pair.files.target
    layers = AutoConfig.from_pretrained(teacher).num_hidden_layers
    kept = model_from_target(teacher, options.layers or layers // 2, folder, pair.tokenizer)
    say(f"the smaller target has layers {kept} of {layers}; {len(signals)} answers to learn from")
    module = load_model(folder)
    sides = {"before": (kl_from_target(module, held_out), measure_quality(module, held_out))}
    # A few layers have nothing worth rehearsing.
    recipe = Recipe(epochs=options.epochs, learning_rate=options.target_rate, rehearsal=0)
    train("the smaller target", module, signals, recipe)
    save_model(module, folder, teacher, pair.tokenizer)
    module = load_model(folder)
    sides["after"] = (kl_from_target(module, held_out), measure_quality(module, held_out))
    kl_R = {when: side[0] for when, side in sides.items()}
    agreement = {when: float(side[1].acceptance_R.mean()) for when, side in sides.items()}
    rows = [[when, f"{kl_R[when].mean():.3f}", f"{agreement[when]:.3f}"] for when in sides]
    head = ["distillation", "KL to the teacher, nats", "Σ min(p, q), or same first choice"]
    table(head, rows, f"smaller target, {len(held_out)} held-out requests")
    after = paired_difference(kl_R["after"], np.zeros_like(kl_R["after"]))
    return {
        "layers": kept,
        "requests": len(held_out),
        "kl": {"before": float(kl_R["before"].mean()), "after": after.figures},
        "kl_gained": paired_difference(kl_R["after"], kl_R["before"]).figures,
        "agreement": agreement,
    }


def _draft(
    what: str, pair: rig.Pair, signals: Sequence[Signal], recipe: Recipe, folder: Path
) -> None:
    module = load_model(pair.files.draft)
    train(what, module, signals, recipe)
    save_model(module, folder, pair.files.draft, pair.tokenizer)


def _drafts(out: Path, held_out: dict[str, list[Signal]]) -> dict[str, dict[str, Any]]:
    """Prints and returns how each target's own draft and the common one compare."""
    found, rows = {}, []
    for who, signals in held_out.items():
        own = measure_quality(load_model(out / OWN_DRAFTS[who]), signals)
        common = measure_quality(load_model(out / "common-draft"), signals)
        gain = paired_difference(common.tokens_R, own.tokens_R)
        tokens, shared = float(own.tokens_R.mean()), float(common.tokens_R.mean())
        acceptance = float(own.acceptance_R.mean())
        rows.append([who, f"{tokens:.3f}", f"{acceptance:.3f}", f"{shared:.3f}", f"{gain:+.3f}"])
        found[who] = {
            "acceptance": acceptance,
            "tokens_per_step": tokens,
            "common_tokens_per_step": shared,
            "common_gain": gain.figures,
        }
    head = ["target", "τ of its own draft", "acceptance", "τ of the common one", "gain (95 %)"]
    table(head, rows)
    return found


def _speeds(
    options: Options, pairs: dict[str, rig.Pair], prompts: list[list[int]]
) -> dict[str, list[float]]:
    """Prints speeds; each one's ratio to the plain teacher, with its interval."""
    makers = {
        who: (Ours, pair, options.max_tokens, str(options.out / OWN_DRAFTS[who]), 1)
        for who, pair in pairs.items()
    }
    repetitions, alone = options.repetitions, options.alone
    results = measure(makers, [CONTESTANTS], prompts, repetitions=repetitions, alone=alone)
    show([CONTESTANTS], results)
    return {name: over(results, name, REFERENCE).figures for name in results}
