"""`python -m lab gate`: how often the gate is wrong, on real signals.

The engine answers the prompts; the active draft and real candidates are marked on the answers. Then requests are drawn
from those marks, again and again, and the function that decides in the service decides on them. What is true is what
holds over all the answers, so every draw is of a population whose truth is known:

null        a candidate's own differences, centred: exactly as good as the active draft
noise       the active draft with noise in its weights, where that is not better over all the answers
gain        a candidate's differences, moved to a gain of 3 % (`--gain`)
forgetting  the same, with a loss of twice the tolerance on earlier traffic

Each is drawn with and without earlier traffic, of which only the last loses. The figures are the worst of each kind.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

from lab import rig
from lab.statistics import Ratio, proportion
from lab.warmup.answers import answers
from online.settings import Settings
from online.signals import Signal
from trainer.distill import distill
from trainer.evaluation import Evaluation, evaluate, served_gamma
from trainer.gate import PairedEvaluation, decide
from trainer.recipe import Recipe

NOISES = (0.01, 0.03, 0.1)  # of a tensor's own standard deviation


@dataclass(frozen=True)
class Trials:
    """Draws of one kind of candidate, and how many of them the gate promoted."""

    kind: str
    name: str
    gain: float  # true one, of the active draft's tokens per step
    earlier: str
    promoted: Ratio
    draws: int


class Simulation:
    def __init__(self, args: argparse.Namespace, settings: Settings, active: Evaluation) -> None:
        self._args, self._active = args, active
        self._decide = partial(decide, gamma=args.gamma, tolerance=settings.forgetting_tolerance)
        self._level = float(active.tokens_R.mean())

    def gain(self, candidate: Evaluation) -> float:
        return float((candidate.tokens_R - self._active.tokens_R).mean()) / self._level

    def moved(self, candidate: Evaluation, gain: float) -> Evaluation:
        """The same differences about another mean."""
        return candidate._replace(
            tokens_R=candidate.tokens_R + (gain - self.gain(candidate)) * self._level
        )

    def trials(
        self, kind: str, named: Sequence[tuple[str, Evaluation]], lost: float | None
    ) -> Trials:
        """By turns of the candidates, with `lost` on earlier traffic; None: there is none."""
        rng = np.random.default_rng(len(kind))
        promoted = 0
        for draw in range(self._args.draws):
            candidate = named[draw % len(named)][1]
            new = self._drawn(candidate, self._args.requests, rng)
            before = self._drawn(
                self.moved(candidate, -(lost or 0)), 0 if lost is None else self._args.earlier, rng
            )
            promoted += self._decide(new, before, seed=draw).promote
        gain = float(np.mean([self.gain(candidate) for _, candidate in named]))
        told = "none" if lost is None else f"{-lost:+.0%}"
        names = named[0][0] if len(named) == 1 else f"{len(named)} candidates"
        return Trials(
            kind, names, gain, told, proportion(promoted, self._args.draws), self._args.draws
        )

    def _drawn(
        self, candidate: Evaluation, requests: int, rng: np.random.Generator
    ) -> PairedEvaluation:
        picks = rng.integers(0, len(candidate.tokens_R), requests)
        return PairedEvaluation(
            *(Evaluation(*(marks[picks] for marks in side)) for side in (self._active, candidate))
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    parser.set_defaults(prompt_count=600)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--lessons", type=int, default=200, help="answers that the candidates learn from"
    )
    parser.add_argument("--noisy", type=int, default=12, help="candidates made by noise")
    parser.add_argument("--requests", type=int, default=200, help="held-out requests of a draw")
    parser.add_argument(
        "--earlier", type=int, default=100, help="earlier held-out requests of a draw"
    )
    parser.add_argument("--draws", type=int, default=1000, help="simulated candidates of each kind")
    parser.add_argument(
        "--gain", type=float, default=0.03, help="gain in tokens per step that should be found"
    )
    parser.add_argument(
        "--gamma", type=int, default=0, help="compared at (default: as the service finds it)"
    )
    args = parser.parse_args()
    started, settings = time.monotonic(), Settings()
    pair = rig.pair_of(args)
    signals = answers(pair, pair.prompts, args.max_tokens, gamma=None)
    torch.set_num_threads(pair.threads)
    examples, exam = signals[: args.lessons], signals[args.lessons :]
    args.gamma = args.gamma or served_gamma(exam, settings.gamma or 1)
    print(f"{len(exam)} answers to draw from, γ = {args.gamma}", flush=True)
    marked = {
        name: _marks(module, exam, args.gamma)
        for name, module in _drafts(pair, examples, args, settings)
    }
    simulation = Simulation(args, settings, marked.pop("active"))
    for name, marks in marked.items():
        print(
            f"{name:16} {simulation.gain(marks):+7.1%} tokens per step over all of them", flush=True
        )
    found = _simulate(simulation, marked, args.gain, settings.forgetting_tolerance)
    _table(found)
    figures = {
        **_figures(found),
        "requests": args.requests,
        "draws": args.draws,
        "answers": len(exam),
        "gamma": args.gamma,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(figures))


def _drafts(
    pair: rig.Pair, examples: Sequence[Signal], args: argparse.Namespace, settings: Settings
) -> Iterable[tuple[str, nn.Module]]:
    """The active draft; learnt ones, as the service's recipe and more careful ones make them; noisy ones."""
    load = partial(
        transformers.AutoModelForCausalLM.from_pretrained, pair.files.draft, dtype=torch.float32
    )
    yield "active", load()
    for name, rate in (("learnt", 1.0), ("learnt gently", 0.25)):
        module = load()
        recipe = Recipe.of(settings.recipe)
        recipe = replace(recipe, learning_rate=rate * recipe.learning_rate)
        distill(module, [examples], recipe, int(module.config.pad_token_id or 0))
        yield name, module
    for i in range(args.noisy):
        yield f"noise {i}", noisy(load(), NOISES[i % len(NOISES)], seed=i)


def noisy(module: nn.Module, scale: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale * parameter.std(correction=0))
    return module


def _marks(module: nn.Module, exam: Sequence[Signal], gamma: int) -> Evaluation:
    return evaluate(module, exam, gamma, int(module.config.pad_token_id or 0))  # type: ignore[union-attr, arg-type]


def _simulate(
    simulation: Simulation, marked: dict[str, Evaluation], gain: float, tolerance: float
) -> list[Trials]:
    learnt = {name: marks for name, marks in marked.items() if not name.startswith("noise")}
    noise = [
        (name, m) for name, m in marked.items() if name not in learnt and simulation.gain(m) <= 0
    ]
    found = []
    for earlier in (None, 0.0):
        for name, marks in learnt.items():
            found.append(simulation.trials("null", [(name, simulation.moved(marks, 0))], earlier))
        if noise:
            found.append(simulation.trials("noise", noise, earlier))
        for name, marks in learnt.items():
            found.append(
                simulation.trials("gain", [(name, simulation.moved(marks, gain))], earlier)
            )
    for name, marks in learnt.items():
        found.append(
            simulation.trials("forgetting", [(name, simulation.moved(marks, gain))], 2 * tolerance)
        )
    return found


def _table(found: Sequence[Trials]) -> None:
    print(
        f"\n{'kind':11} {'candidate':16} {'true gain':>9} {'earlier':>8} {'promoted':>9} {'95 %':>16}"
    )
    for t in found:
        interval = f"{t.promoted.low:.1%} to {t.promoted.high:.1%}"
        print(
            f"{t.kind:11} {t.name:16} {t.gain:+9.1%} {t.earlier:>8} {t.promoted.value:9.1%} {interval:>16}"
        )


def _figures(found: Sequence[Trials]) -> dict[str, object]:
    """The worst of each kind."""

    def worst(kinds: Sequence[str], of: Callable[..., Ratio]) -> Ratio:
        return of(
            (t.promoted for t in found if t.kind in kinds), key=lambda promoted: promoted.value
        )

    false, power, forgetting = (
        worst(("null", "noise"), max),
        worst(("gain",), min),
        worst(("forgetting",), max),
    )
    return {
        "false_promotion": false.value,
        "false_promotion_high": round(false.high, 4),
        "power": power.value,
        "power_low": round(power.low, 4),
        "forgetting_promoted": forgetting.value,
        "forgetting_promoted_high": round(forgetting.high, 4),
    }
