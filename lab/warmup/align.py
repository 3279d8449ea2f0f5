"""`python -m lab warm-up`: a draft for a target, made before there is traffic.

Direct Alignment (arXiv 2403.00858): a draft is initialised, from another draft or from the target's own layers; the
target answers prompts; the draft learns from its answers. The engine answers and its recorder logs, as while it serves,
and the draft learns by a recipe of the trainer. The result is a model folder, and on request version 1 of a route.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from lab import rig
from lab.warmup.answers import (
    BOTH,
    HELD_OUT_GAMMA,
    SAMPLED,
    add_arguments,
    load_model,
    model_from_target,
    output_tokens,
    pad_id,
    save_model,
    say,
    stored_dtype,
    train,
    training_and_held_out,
)
from lab.warmup.prompts import frame_of
from lab.warmup.register import opened, register
from online.artifacts import ArtifactStore
from online.errors import SlipstreamError
from online.settings import Settings
from trainer.divergences import names
from trainer.gate import GateReport, compare_drafts
from trainer.recipe import Recipe

LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab warm-up", description=__doc__)
    add_arguments(parser, prompt_count=1000)
    parser.add_argument(
        "--layers",
        type=int,
        help=f"without --draft: so many of the target's own layers (default: {LAYERS})",
    )
    parser.add_argument(
        "--unprompted", action="store_true", help="the target writes --prompt-count queries itself"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft")
    parser.add_argument(
        "--register",
        metavar="ROUTE",
        help="make it version 1 of this route, in SLIPSTREAM_DATABASE_URL",
    )
    usual = Recipe()
    parser.add_argument("--divergence", choices=names(), default=usual.divergence)
    parser.add_argument("--epochs", type=int, default=usual.epochs)
    parser.add_argument("--learning-rate", type=float, default=usual.learning_rate)
    args = parser.parse_args()
    if args.draft and args.layers:
        parser.error("a draft begins as --draft, or with --layers of the target: not both")
    if args.unprompted and args.prompts:
        parser.error("--unprompted is for when there are no --prompts")
    transformers.utils.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _run(args, Path(folder))
    except (SlipstreamError, ValueError) as error:
        sys.exit(f"warm-up: {error}")


def _run(args: argparse.Namespace, folder: Path) -> None:
    settings = Settings()
    registry = opened(settings, args.register) if args.register else None
    initial = _begin(args, folder)
    pair = rig.pair_of(args)
    if args.unprompted:
        pair = replace(pair, prompts=[frame_of(pair.tokenizer).head] * args.prompt_count)
    # Greedily it would always write the same query.
    examples, exam = training_and_held_out(args, pair, SAMPLED if args.unprompted else BOTH)
    say(f"{len(examples)} answers to learn from, {len(exam)} to judge by")

    module, before = load_model(args.draft), load_model(args.draft)
    recipe = Recipe(
        divergence=args.divergence, epochs=args.epochs, learning_rate=args.learning_rate
    )
    if isinstance(initial, dict):  # some layers of a target know nothing that is worth rehearsing
        recipe = replace(recipe, rehearsal=0)
    distilled = train("learning", module, examples, recipe)
    save_model(module, args.out, stored_dtype(args.draft), pair.tokenizer)
    report = compare_drafts(
        before, load_model(args.out), exam, gamma=HELD_OUT_GAMMA, pad_id=pad_id(module)
    )
    made = {
        "initial": initial,
        "answers": len(examples),
        "steps": distilled.steps,
        "positions": distilled.positions,
    }
    figures = {
        **made,
        "answer_tokens": output_tokens(examples),
        "train_s": round(distilled.seconds, 1),
        "out": str(args.out),
    }
    if registry:
        publish = lambda into: shutil.copytree(args.out, into, dirs_exist_ok=True)
        about = {**recipe.as_dict(), **made}
        artifacts = ArtifactStore(settings.artifacts_path)
        version = register(registry, artifacts, args.register, publish, about, report.as_dict())
        figures.update(route=args.register, version=version.id)
        say(
            f"version {version.id} of route {args.register!r}; serve it with SLIPSTREAM_DRAFT={args.out}"
        )
    _table(report)
    print(json.dumps({**figures, **_marks(report)}))


def _begin(args: argparse.Namespace, folder: Path) -> object:
    """What the draft begins as, for its recipe; `args.draft` is there afterwards."""
    if args.draft:
        return str(args.draft)
    target = rig.files_of(args).target
    kept = model_from_target(
        target, args.layers or LAYERS, folder, AutoTokenizer.from_pretrained(target)
    )
    args.draft = str(folder)
    return {"target_layers": kept}


def _table(report: GateReport) -> None:
    print(f"\n{'':10} {'tokens a step':>14} {'acceptance':>11}")
    print(f"{'before':10} {report.active_tokens_per_step:14.3f} {report.active_acceptance:11.3f}")
    print(
        f"{'after':10} {report.candidate_tokens_per_step:14.3f} {report.candidate_acceptance:11.3f}"
    )
    print(f"held-out requests, γ = {report.gamma}: {report.reason}\n")


def _marks(report: GateReport) -> dict[str, float]:
    return {
        "tokens_per_step_before": round(report.active_tokens_per_step, 3),
        "tokens_per_step_after": round(report.candidate_tokens_per_step, 3),
        "acceptance_before": round(report.active_acceptance, 3),
        "acceptance_after": round(report.candidate_acceptance, 3),
    }
