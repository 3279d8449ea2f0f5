"""`python -m lab cold-start`: a route that nobody has asked anything. Which prompts teach its draft most?

Dual Student (arXiv 2309.10058): prompts are grown toward what two students disagree on, the target answers them, both
learn, and so on. Beside it prompts drawn at random, at the same budget of target tokens. No query of real traffic is
learnt from; `--prompts` are held out, and measure.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from lab import rig
from lab.warmup.answers import (
    SAMPLED,
    answers,
    load_model,
    output_tokens,
    pad_id,
    save_model,
    say,
    stored_dtype,
)
from lab.warmup.prompts import SOURCES, STUDENTS, frame_of, prompts
from lab.warmup.quality import Difference, Quality, difference, measure_quality
from online.signals import Signal
from trainer.distill import distill
from trainer.recipe import Recipe

BLUR = 0.1  # by how much the second student differs from the draft at the start, as a share of each tensor's deviation


@dataclass
class Run:
    """One source of prompts, with one seed."""

    source: str
    seed: int
    students: list[nn.Module]
    tokens: int = 0  # of the target, that it has learnt from

    @property
    def name(self) -> str:
        return f"{self.source}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab cold-start",
        description=__doc__,
        epilog="sources: " + "; ".join(f"{name}: {what}" for name, what in SOURCES.items()),
    )
    rig.add_arguments(parser)
    parser.set_defaults(prompt_count=100)
    parser.add_argument(
        "--sources",
        default="random,disagree,own",
        help="what is compared; the first is the reference",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--budget", type=int, default=2500, help="target tokens a round, of every run"
    )
    parser.add_argument("--asked", type=int, default=96, help="prompts a round, at most")
    parser.add_argument(
        "--max-tokens", type=int, default=72, help="of an answer (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=2, help="over what was answered in a round")
    parser.add_argument(
        "--children", type=int, default=4, help="of which the most disputed one lives on"
    )
    parser.add_argument("--out", type=Path, help="folder for a draft of every source and seed")
    args = parser.parse_args()
    if unknown := set(args.sources.split(",")) - set(SOURCES):
        parser.error(f"--sources: no {', '.join(sorted(unknown))}")
    transformers.utils.logging.disable_progress_bar()
    pair = rig.pair_of(args)
    exam = answers(pair, pair.prompts, args.max_tokens, "exam")
    runs = [
        Run(source, seed, students(pair.files.draft, seed)[: STUDENTS[source]])
        for source in args.sources.split(",")
        for seed in range(args.seeds)
    ]
    before = measure_quality(runs[0].students[0], exam)
    for number in range(args.rounds):
        _round(args, pair, runs, number)
    for run in runs if args.out else ():
        save_model(
            copy.deepcopy(run.students[0]),
            args.out / run.name,
            stored_dtype(pair.files.draft),
            pair.tokenizer,
        )
    marks = {run.name: measure_quality(run.students[0], exam) for run in runs}
    print(json.dumps(_report(args, runs, before, marks, len(exam))))


def students(draft: str | Path, seed: int) -> list[nn.Module]:
    """The draft, and the draft blurred: two that a route could begin with."""
    first, second = load_model(draft), load_model(draft)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in second.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * tensor.std(correction=0), alpha=BLUR)
    return [first, second]


def _round(args: argparse.Namespace, pair: rig.Pair, runs: Sequence[Run], number: int) -> None:
    """Every run asks, all are answered together, every run learns."""
    frame, vocab_size = frame_of(pair.tokenizer), runs[0].students[0].config.vocab_size
    asked = [
        prompts(
            run.source,
            args.asked,
            run.students,
            frame,
            args.children,
            vocab_size,
            1000 * run.seed + number,
        )
        for run in runs
    ]
    every = [prompt for own in asked for prompt in own]
    # Sampled: a target that writes its own queries would always write the same one.
    answered = answers(
        pair, every, args.max_tokens, "", seed=len(every) * number, temperatures=SAMPLED
    )
    for i, run in enumerate(runs):
        own = [s for s in answered if int(s.request_id) // args.asked == i]
        taught = within(own, args.budget)
        for j, student in enumerate(run.students):
            recipe = Recipe(epochs=args.epochs, seed=2 * run.seed + j)
            told = distill(student, [taught], recipe, pad_id(student))
        run.tokens += output_tokens(taught)
        loss = f"loss {told.first_loss:.3f} to {told.last_loss:.3f}"
        say(f"round {number + 1}, {run.name}: {run.tokens} target tokens, {loss}")


def within(signals: Sequence[Signal], budget: int) -> list[Signal]:
    """The first signals that have `budget` tokens together, the last one cut."""
    kept: list[Signal] = []
    for signal in signals:
        left = budget - output_tokens(kept)
        if left <= 0:
            break
        kept.append(replace(signal, output_ids=signal.output_ids[:left]))
    return kept


def _report(
    args: argparse.Namespace,
    runs: Sequence[Run],
    before: Quality,
    marks: dict[str, Quality],
    requests: int,
) -> dict[str, object]:
    sources = args.sources.split(",")
    mean = {s: Quality.mean([marks[run.name] for run in runs if run.source == s]) for s in sources}
    print(
        f"\n{'':10} {'target tokens':>13} {'tokens a step':>14} {'acceptance':>11} {'KL':>6}  per seed"
    )
    print(f"{'before':10} {0:13} {before.row}")
    for source, own in mean.items():
        tokens = [run.tokens for run in runs if run.source == source]
        seeds = [
            round(float(marks[run.name].tokens_R.mean()), 3) for run in runs if run.source == source
        ]
        print(f"{source:10} {sum(tokens) // len(tokens):13} {own.row}  {seeds}")
    against: dict[str, Difference] = {
        source: difference(mean[source].tokens_R, mean[sources[0]].tokens_R)
        for source in sources[1:]
    }
    for source, found in against.items():
        print(f"{source} over {sources[0]}: {found} tokens a step")
    return {
        "requests": requests,
        "seeds": args.seeds,
        "tokens_per_step": {
            "before": before.step,
            **{source: own.step for source, own in mean.items()},
        },
        "target_tokens": {run.name: run.tokens for run in runs},
        f"over_{sources[0]}": {source: found.figures for source, found in against.items()},
    }


if __name__ == "__main__":
    main()
