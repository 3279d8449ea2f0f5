"""`python -m lab cold-start`: for a route without any query, which prompts teach its draft most?

Dual Student (arXiv 2309.10058): prompts are selected for the disagreement
of two students, the target answers them, both students learn, and so on.
Beside it prompts drawn at random, at the same budget of target tokens. No
real query is learnt from; `--prompts` are held out, to compare on.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lab import rig
from lab.warmup.answers import SAMPLED, answers, output_tokens
from lab.warmup.models import load_model, pad_id, save_model
from lab.warmup.options import add, parser, say
from lab.warmup.prompts import SOURCES, STUDENTS, frame_of, prompts
from lab.warmup.quality import HEADER, Difference, Quality, measure_quality
from online.signals import Signal
from trainer.distill import distill
from trainer.recipe import Recipe

NOISE = 0.1  # of the second student, as a share of each tensor's standard deviation


@dataclass
class Run:
    """One source of prompts, with one seed."""

    source: str
    seed: int
    students: list[nn.Module]
    tokens: int = 0  # target tokens that it has learnt from

    @property
    def name(self) -> str:
        return f"{self.source}-{self.seed}"


def main() -> None:
    args = _arguments()
    pair = rig.pair_of(args)
    held_out = answers(pair, pair.prompts, args.max_tokens, "exam")
    runs = [
        Run(source, seed, students(pair.files.draft, seed)[: STUDENTS[source]])
        for source in args.sources.split(",")
        for seed in range(args.seeds)
    ]
    before = measure_quality(runs[0].students[0], held_out)
    for number in range(args.rounds):
        _round(args, pair, runs, number)
    for run in runs if args.out else ():
        draft = copy.deepcopy(run.students[0])
        save_model(draft, args.out / run.name, pair.files.draft, pair.tokenizer)
    after = {run.name: measure_quality(run.students[0], held_out) for run in runs}
    figures = _report(args, runs, before, after)
    print(json.dumps({"requests": len(held_out), "seeds": args.seeds, **figures}))


def _arguments() -> argparse.Namespace:
    options = parser("cold-start", __doc__, prompt_count=100)
    options.epilog = "sources: " + "; ".join(f"{name}: {what}" for name, what in SOURCES.items())
    options.set_defaults(max_tokens=72)
    add(
        options,
        sources=("random,disagree,own", "what is compared; the first is the reference"),
        seeds=(3, ""),
        rounds=(3, ""),
        budget=(2500, "target tokens of every run in a round"),
        asked=(96, "prompts a round, at most"),
        epochs=(2, "over a round's answers"),
        children=(4, "prompts of a family, of which the most disputed survives"),
    )
    options.add_argument("--out", type=Path, help="folder for a draft of every source and seed")
    args = options.parse_args()
    if unknown := set(args.sources.split(",")) - set(SOURCES):
        options.error(f"--sources: no {', '.join(sorted(unknown))}")
    return args


def students(draft: str | Path, seed: int) -> list[nn.Module]:
    """The draft, and the draft with noise: two drafts that a route could begin with."""
    first, second = load_model(draft), load_model(draft)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in second.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * tensor.std(correction=0), alpha=NOISE)
    return [first, second]


def _round(args: argparse.Namespace, pair: rig.Pair, runs: Sequence[Run], number: int) -> None:
    """Every run asks, all prompts are answered together, every run learns."""
    frame, vocab_size = (frame_of(pair.tokenizer), runs[0].students[0].config.vocab_size)
    asked = []
    for run in runs:
        seed, children = 1000 * run.seed + number, args.children
        asked += prompts(run.source, args.asked, run.students, frame, children, vocab_size, seed)
    # Sampled: a greedy target would write the same query every time.
    seed = len(asked) * number
    answered = answers(pair, asked, args.max_tokens, "", seed=seed, temperatures=SAMPLED)
    for i, run in enumerate(runs):
        own = [s for s in answered if int(s.request_id) // args.asked == i]
        taught = within(own, args.budget)
        for j, student in enumerate(run.students):
            recipe = Recipe(epochs=args.epochs, seed=2 * run.seed + j)
            distilled = distill(student, [taught], recipe, pad_id(student))
        run.tokens += output_tokens(taught)
        loss = f"loss {distilled.first_loss:.3f} to {distilled.last_loss:.3f}"
        say(f"round {number + 1}, {run.name}: {run.tokens} target tokens, {loss}")


def within(signals: Sequence[Signal], budget: int) -> list[Signal]:
    """The first signals, of `budget` output tokens together; the last one is cut."""
    kept: list[Signal] = []
    for signal in signals:
        left = budget - output_tokens(kept)
        if left <= 0:
            break
        kept.append(replace(signal, output_ids=signal.output_ids[:left]))
    return kept


def _report(
    args: argparse.Namespace, runs: Sequence[Run], before: Quality, after: dict[str, Quality]
) -> dict[str, object]:
    reference, *others = sources = args.sources.split(",")
    print(f"\n{'':10} {'target tokens':>13} {HEADER}  per seed")
    print(f"{'before':10} {0:13} {before.columns}")
    mean = {}
    for source in sources:
        own = [run for run in runs if run.source == source]
        by_seed = [after[run.name] for run in own]
        mean[source] = Quality.mean(by_seed)
        tokens = sum(run.tokens for run in own) // len(own)
        seeds = [quality.tokens_per_step for quality in by_seed]
        print(f"{source:10} {tokens:13} {mean[source].columns}  {seeds}")
    over = {}
    for source in others:
        difference = Difference.of(mean[source].tokens_R, mean[reference].tokens_R)
        print(f"{source} over {reference}: {difference} tokens a step")
        over[source] = difference.figures
    return {
        "tokens_per_step": {
            "before": before.tokens_per_step,
            **{source: quality.tokens_per_step for source, quality in mean.items()},
        },
        "target_tokens": {run.name: run.tokens for run in runs},
        f"over_{reference}": over,
    }


if __name__ == "__main__":
    main()
