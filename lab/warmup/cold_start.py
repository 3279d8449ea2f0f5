"""`python -m lab cold-start`: for a route without any query, which prompts teach its draft most?

Dual Student (arXiv 2309.10058): prompts are selected for the disagreement of two students, the
target answers them, both students learn, and so on. Beside it prompts drawn at random, and queries
that the target writes itself, at the same budget of target tokens. No real query is trained on;
`--prompts` are held out, to compare on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lab import rig
from lab.options import PairOptions, option, parse
from lab.output import finish, say
from lab.warmup.answers import SAMPLED, answers, output_tokens
from lab.warmup.models import load_model, pad_id, save_model
from lab.warmup.prompts import SOURCES, Source, frame_of, prompts
from lab.warmup.quality import compare, measure_quality
from online.signals import Signal
from trainer.distill import distill
from trainer.recipe import Recipe

NOISE = 0.1  # of the second student, as a share of each tensor's standard deviation


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    prompt_count: int = option(100, "prompts to compare on")
    max_tokens: int = option(72, "of an answer")
    sources: tuple[Source, ...] = option(SOURCES, "what is compared; the first is the reference")
    seeds: int = option(3, "drafts of each source")
    rounds: int = option(3, "of asking and learning")
    budget: int = option(2500, "target tokens of every draft in a round")
    asked: int = option(96, "prompts a round, at most")
    epochs: int = option(2, "over a round's answers")
    children: int = option(4, "prompts of a family, of which the most disputed survives")
    out: Path | None = option(None, "folder for a draft of every source and seed")


@dataclass
class Run:
    """One source of prompts, with one seed."""

    source: Source
    seed: int
    students: list[nn.Module]
    tokens: int = 0  # target tokens that it has learnt from

    @property
    def name(self) -> str:
        return f"{self.source}-{self.seed}"


def main() -> None:
    options = parse(Options, "cold-start", __doc__)
    pair = rig.pair_of(options)
    held_out = answers(pair, pair.prompts, options.max_tokens, "held-out")
    runs = [
        Run(source, seed, students(pair.files.draft, seed, 2 if source == "disagree" else 1))
        for source in options.sources
        for seed in range(options.seeds)
    ]
    before = measure_quality(runs[0].students[0], held_out)
    for number in range(options.rounds):
        _round(options, pair, runs, number)
    found = {
        source: [measure_quality(run.students[0], held_out) for run in runs if run.source == source]
        for source in options.sources
    }
    for run in runs if options.out else ():
        save_model(run.students[0], options.out / run.name, pair.files.draft, pair.tokenizer)
    figures = {
        "requests": len(held_out),
        "seeds": options.seeds,
        "target_tokens": {run.name: run.tokens for run in runs},
    }
    finish({**figures, **compare(before, found)})


def students(draft: str | Path, seed: int, count: int) -> list[nn.Module]:
    """The draft, and copies with noise: drafts that a route could begin with."""
    generator = torch.Generator().manual_seed(seed)
    made = [load_model(draft) for _ in range(count)]
    with torch.no_grad():
        for tensor in (tensor for noisy in made[1:] for tensor in noisy.parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * tensor.std(correction=0), alpha=NOISE)
    return made


def _round(options: Options, pair: rig.Pair, runs: Sequence[Run], number: int) -> None:
    """Every run asks, all prompts are answered together, every run learns."""
    frame = frame_of(pair.tokenizer)
    asked = []
    for run in runs:
        seed = 1000 * run.seed + number
        asked += prompts(run.source, options.asked, run.students, frame, options.children, seed)
    # Sampled: a greedy target would write the same query every time.
    seed = len(asked) * number
    answered = answers(pair, asked, options.max_tokens, "", seed=seed, temperatures=SAMPLED)
    for i, run in enumerate(runs):
        own = [s for s in answered if int(s.request_id) // options.asked == i]
        taught = within(own, options.budget)
        for j, student in enumerate(run.students):
            recipe = Recipe(epochs=options.epochs, seed=2 * run.seed + j)
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
