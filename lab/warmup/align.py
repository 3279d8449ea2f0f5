"""`python -m lab warm-up`: a draft for a target, made before there is traffic.

Direct Alignment (arXiv 2403.00858): a draft begins as another draft or as some of the target's
layers. The target answers prompts, and the draft learns from the answers. The engine answers and
its recorder logs as in the service; the draft learns by a recipe of the trainer. The result is a
model folder, and on request version 1 of a route.
"""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab import rig
from lab.options import option, parse
from lab.output import finish, say, table
from lab.warmup.answers import AnswerOptions, output_tokens, training_and_held_out
from lab.warmup.models import load_model, pad_id, save_model, train, with_draft_from_target
from lab.warmup.prompts import frame_of
from lab.warmup.quality import HELD_OUT_GAMMA
from lab.warmup.register import opened, register
from online.artifacts import ArtifactStore
from online.settings import Settings
from trainer.gate import GateReport, compare_drafts
from trainer.recipe import Recipe

LAYERS = 2
USUAL = Recipe()
RECORDED = ("initial", "answers", "steps", "positions")  # of the figures, in the registry


@dataclass(frozen=True, kw_only=True)
class Options(AnswerOptions):
    prompt_count: int = option(1000, "prompts taken from the file")
    layers: int | None = option(
        None, f"without --draft: begin with this many of the target's layers (default: {LAYERS})"
    )
    unprompted: bool = option(False, "the target writes --prompt-count queries itself")
    out: Path = option(help="folder for the draft")
    register: str | None = option(
        None, "make it version 1 of this route, in SLIPSTREAM_DATABASE_URL"
    )
    divergence: str = option(USUAL.divergence, "that training makes small")
    epochs: int = option(USUAL.epochs, "over the answers")
    learning_rate: float = option(USUAL.learning_rate, "of training")

    def __post_init__(self) -> None:
        if self.draft and self.layers:
            raise ValueError("a draft begins as --draft, or with --layers of the target: not both")
        if self.unprompted and self.prompts:
            raise ValueError("--unprompted is for when there are no --prompts")
        _ = self.recipe

    @property
    def recipe(self) -> Recipe:
        names = ("divergence", "epochs", "learning_rate")
        return Recipe.of({name: getattr(self, name) for name in names})


def main() -> None:
    options = parse(Options, "warm-up", __doc__)
    settings = Settings()
    registry = opened(settings, options.register) if options.register else None
    with tempfile.TemporaryDirectory() as folder:
        made, report = _make(options, Path(folder))
    figures = {**made, "out": str(options.out), **_compared(report)}
    if registry and options.register:
        write = lambda into: shutil.copytree(options.out, into, dirs_exist_ok=True)
        artifacts = ArtifactStore(settings.artifacts_path)
        recipe = made["recipe"] | {name: made[name] for name in RECORDED}
        gate = report.as_dict()
        version = register(registry, artifacts, options.register, write, recipe, gate)
        figures |= {"route": options.register, "version": version.id}
        serve = f"serve it with SLIPSTREAM_DRAFT={options.out}"
        say(f"version {version.id} of route {options.register!r}; {serve}")
    finish(figures)


def _make(options: Options, folder: Path) -> tuple[dict[str, Any], GateReport]:
    """Trains and saves the draft; how it was made, and how it compares with its beginning."""
    initial: object = options.draft
    recipe = options.recipe
    if not options.draft:
        options, kept = with_draft_from_target(options, options.layers or LAYERS, folder)
        initial = {"target_layers": kept}
        recipe = replace(recipe, rehearsal=0)  # a few layers have nothing worth rehearsing
    pair = rig.pair_of(options)
    if options.unprompted:
        head = frame_of(pair.tokenizer).head
        pair = replace(pair, prompts=[head] * options.prompt_count)
    unprompted = options.unprompted
    signals, held_out = training_and_held_out(options, pair, unprompted=unprompted)
    say(f"{len(signals)} answers to learn from, {len(held_out)} held out")
    module, before = load_model(options.draft), load_model(options.draft)
    distilled = train("learning", module, signals, recipe)
    save_model(module, options.out, options.draft, pair.tokenizer)
    gate = {"gamma": HELD_OUT_GAMMA, "pad_id": pad_id(module)}
    made = {
        "initial": initial,
        "recipe": recipe.as_dict(),
        "answers": len(signals),
        "answer_tokens": output_tokens(signals),
        "steps": distilled.steps,
        "positions": distilled.positions,
        "train_s": distilled.seconds,
    }
    return made, compare_drafts(before, load_model(options.out), held_out, **gate)


def _compared(report: GateReport) -> dict[str, float]:
    """Prints the draft before and after as a table; the same as figures."""
    sides = {
        "before": (report.active_tokens_per_step, report.active_acceptance),
        "after": (report.candidate_tokens_per_step, report.candidate_acceptance),
    }
    rows = [[when, *(f"{value:.3f}" for value in side)] for when, side in sides.items()]
    table(["", "tokens a step", "acceptance"], rows, f"held-out requests, γ = {report.gamma}")
    print(report.reason)
    figures = {}
    for when, (tokens, acceptance) in sides.items():
        figures[f"tokens_per_step_{when}"] = tokens
        figures[f"acceptance_{when}"] = acceptance
    return figures
