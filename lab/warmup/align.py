"""`python -m lab warm-up`: a draft for a target, made before there is traffic.

Direct Alignment (arXiv 2403.00858): a draft begins as another draft or as
some of the target's layers; the target answers prompts; the draft learns
from the answers. The engine answers and its recorder logs as in the
service, and the draft learns by a recipe of the trainer. The result is a
model folder, and on request version 1 of a route.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from lab import rig
from lab.warmup.answers import BOTH, SAMPLED, output_tokens, training_and_held_out
from lab.warmup.models import load_model, model_from_target, pad_id, save_model, train
from lab.warmup.options import add, add_held_out, parser, say
from lab.warmup.prompts import frame_of
from lab.warmup.quality import HELD_OUT_GAMMA
from lab.warmup.register import opened, register
from online.artifacts import ArtifactStore
from online.errors import SlipstreamError
from online.settings import Settings
from trainer.divergences import names
from trainer.gate import GateReport, compare_drafts
from trainer.recipe import Recipe

LAYERS = 2


def main() -> None:
    args = _arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _run(args, Path(folder))
    except (SlipstreamError, ValueError) as error:
        sys.exit(f"warm-up: {error}")


def _arguments() -> argparse.Namespace:
    options, usual = parser("warm-up", __doc__, prompt_count=1000), Recipe()
    add_held_out(options)
    layers = f"without --draft: begin with this many of the target's layers (default: {LAYERS})"
    options.add_argument("--layers", type=int, help=layers)
    unprompted = "the target writes --prompt-count queries itself"
    options.add_argument("--unprompted", action="store_true", help=unprompted)
    options.add_argument("--out", type=Path, required=True, help="folder for the draft")
    route = "make it version 1 of this route, in SLIPSTREAM_DATABASE_URL"
    options.add_argument("--register", metavar="ROUTE", help=route)
    options.add_argument("--divergence", choices=names(), default=usual.divergence)
    add(options, epochs=(usual.epochs, ""), learning_rate=(usual.learning_rate, ""))
    args = options.parse_args()
    if args.draft and args.layers:
        options.error("a draft begins as --draft, or with --layers of the target: not both")
    if args.unprompted and args.prompts:
        options.error("--unprompted is for when there are no --prompts")
    return args


def _run(args: argparse.Namespace, folder: Path) -> None:
    settings = Settings()
    registry = opened(settings, args.register) if args.register else None
    initial = _begin(args, folder)
    pair = rig.pair_of(args)
    if args.unprompted:
        pair = replace(pair, prompts=[frame_of(pair.tokenizer).head] * args.prompt_count)
    # A greedy target would write the same query every time.
    signals, held_out = training_and_held_out(args, pair, SAMPLED if args.unprompted else BOTH)
    say(f"{len(signals)} answers to learn from, {len(held_out)} to judge by")

    module, before = load_model(args.draft), load_model(args.draft)
    rate = args.learning_rate
    recipe = Recipe(divergence=args.divergence, epochs=args.epochs, learning_rate=rate)
    if isinstance(initial, dict):  # Some layers of a target have nothing worth rehearsing.
        recipe = replace(recipe, rehearsal=0)
    distilled = train("learning", module, signals, recipe)
    save_model(module, args.out, args.draft, pair.tokenizer)
    gate = {"gamma": HELD_OUT_GAMMA, "pad_id": pad_id(module)}
    report = compare_drafts(before, load_model(args.out), held_out, **gate)
    made = {
        "initial": initial,
        "answers": len(signals),
        "steps": distilled.steps,
        "positions": distilled.positions,
    }
    figures = {
        **made,
        "answer_tokens": output_tokens(signals),
        "train_s": round(distilled.seconds, 1),
        "out": str(args.out),
    }
    if registry:
        publish = lambda into: shutil.copytree(args.out, into, dirs_exist_ok=True)
        about, artifacts = (
            {**recipe.as_dict(), **made},
            ArtifactStore(settings.artifacts_path),
        )
        version = register(registry, artifacts, args.register, publish, about, report.as_dict())
        figures.update(route=args.register, version=version.id)
        serve = f"serve it with SLIPSTREAM_DRAFT={args.out}"
        say(f"version {version.id} of route {args.register!r}; {serve}")
    print(json.dumps({**figures, **_compared(report)}))


def _begin(args: argparse.Namespace, folder: Path) -> object:
    """What the draft begins as, for its recipe. Sets `args.draft` if it is missing."""
    if args.draft:
        return str(args.draft)
    target = rig.files_of(args).target
    tokenizer = AutoTokenizer.from_pretrained(target)
    kept = model_from_target(target, args.layers or LAYERS, folder, tokenizer)
    args.draft = str(folder)
    return {"target_layers": kept}


def _compared(report: GateReport) -> dict[str, float]:
    """Prints the draft before and after as a table; the same as figures."""
    print(f"\n{'':10} {'tokens a step':>14} {'acceptance':>11}")
    sides = {
        "before": (report.active_tokens_per_step, report.active_acceptance),
        "after": (report.candidate_tokens_per_step, report.candidate_acceptance),
    }
    figures = {}
    for when, (tokens, acceptance) in sides.items():
        print(f"{when:10} {tokens:14.3f} {acceptance:11.3f}")
        figures[f"tokens_per_step_{when}"] = round(tokens, 3)
        figures[f"acceptance_{when}"] = round(acceptance, 3)
    print(f"held-out requests, γ = {report.gamma}: {report.reason}\n")
    return figures
