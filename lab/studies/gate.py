"""`python -m lab gate`: how often the gate is wrong, on real signals.

The engine answers the prompts; the active draft and real candidates are evaluated on the answers.
Then requests are drawn from these evaluations, again and again, and the service's own function
decides on them. All answers together are the population, so the truth of every draw is known:

null        a candidate's own differences, centred: exactly as good as the active draft
noise       the active draft with noise in its weights, where it is not better on all answers
gain        a candidate's differences, moved to a gain of 3 % (--gain)
forgetting  the same, with a loss of twice the tolerance on earlier traffic

The first three run with and without earlier traffic, on which nothing is lost. The figures are the
worst of each kind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers
from torch import nn

from lab import rig
from lab.options import PairOptions, option, parse
from lab.output import finish, say, table
from lab.statistics import Estimate, proportion
from lab.warmup.answers import answers
from lab.warmup.models import pad_id
from online.settings import Settings
from online.signals import Signal
from trainer.distill import distill
from trainer.evaluation import Evaluation, evaluate, served_gamma
from trainer.gate import PairedEvaluation, decide
from trainer.recipe import Recipe

NOISES = (0.01, 0.03, 0.1)  # of a tensor's own standard deviation
RATES = {"learnt": 1.0, "learnt gently": 0.25}  # candidate → factor of the recipe's learning rate
NOISE = "noise"


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    prompt_count: int = option(600, "prompts taken from the file")
    max_tokens: int = option(64, "of an answer")
    lessons: int = option(200, "answers that the candidates learn from")
    noisy: int = option(12, "candidates made by noise")
    requests: int = option(200, "held-out requests of a draw")
    earlier: int = option(100, "earlier held-out requests of a draw")
    draws: int = option(1000, "simulated candidates of each kind")
    gain: float = option(0.03, "in tokens per step, that the gate should find")
    gamma: int = option(0, "of the evaluations (default: as the service finds it)")


@dataclass(frozen=True)
class Trials:
    """Draws of one kind of candidate, and how many of them the gate promoted."""

    kind: str
    name: str
    gain: float  # the true one, as a share of the active draft's tokens per step
    loss: float | None  # the true one on earlier traffic; None: there is none
    promoted: Estimate


@dataclass(frozen=True)
class Simulation:
    options: Options
    tolerance: float
    active: Evaluation
    gamma: int

    def gain(self, candidate: Evaluation) -> float:
        difference = candidate.tokens_R - self.active.tokens_R
        return float(difference.mean() / self.active.tokens_R.mean())

    def moved(self, candidate: Evaluation, gain: float) -> Evaluation:
        """The same differences with another mean."""
        change = (gain - self.gain(candidate)) * self.active.tokens_R.mean()
        return candidate._replace(tokens_R=candidate.tokens_R + change)

    def trials(
        self, kind: str, candidates: Mapping[str, Evaluation], loss: float | None = None
    ) -> Trials:
        """Draws from the candidates in rotation; `loss` is that on earlier traffic."""
        options, rng, promoted = self.options, np.random.default_rng(len(kind)), 0
        every = list(candidates.values())
        for draw in range(options.draws):
            candidate = every[draw % len(every)]
            new = self._drawn(candidate, options.requests, rng)
            requests = 0 if loss is None else options.earlier
            before = self._drawn(self.moved(candidate, -(loss or 0)), requests, rng)
            verdict = decide(new, before, seed=draw, gamma=self.gamma, tolerance=self.tolerance)
            promoted += verdict.promote
        gain = float(np.mean([self.gain(candidate) for candidate in every]))
        name = next(iter(candidates)) if len(every) == 1 else f"{len(every)} candidates"
        return Trials(kind, name, gain, loss, proportion(promoted, options.draws))

    def all_trials(self, candidates: Mapping[str, Evaluation]) -> list[Trials]:
        learnt = {name: candidates[name] for name in RATES}
        noise = {name: own for name, own in candidates.items() if name not in RATES}
        noise = {name: own for name, own in noise.items() if self.gain(own) <= 0}
        gained = {name: {name: self.moved(own, self.options.gain)} for name, own in learnt.items()}
        found = []
        for loss in (None, 0.0):
            for name, own in learnt.items():
                found.append(self.trials("null", {name: self.moved(own, 0)}, loss))
            if noise:
                found.append(self.trials(NOISE, noise, loss))
            found += [self.trials("gain", own, loss) for own in gained.values()]
        lost = 2 * self.tolerance
        return [*found, *(self.trials("forgetting", own, lost) for own in gained.values())]

    def _drawn(
        self, candidate: Evaluation, requests: int, rng: np.random.Generator
    ) -> PairedEvaluation:
        picks = rng.integers(0, len(candidate.tokens_R), requests)
        sides = (self.active, candidate)
        return PairedEvaluation(
            *(Evaluation(*(values[picks] for values in side)) for side in sides)
        )


def main() -> None:
    options, settings = parse(Options, "gate", __doc__), Settings()
    pair = rig.pair_of(options)
    signals = answers(pair, pair.prompts, options.max_tokens, gamma=None)
    torch.set_num_threads(pair.threads)
    examples, held_out = signals[: options.lessons], signals[options.lessons :]
    gamma = options.gamma or served_gamma(held_out, settings.gamma or 1)
    say(f"{len(held_out)} answers to draw from, γ = {gamma}")
    evaluations = {}
    for name, module in _drafts(pair, examples, options.noisy, settings):
        evaluations[name] = evaluate(module, held_out, gamma, pad_id(module))
        say(f"{name}: {evaluations[name].tokens_R.mean():.3f} tokens per step on all of them")
    active = evaluations.pop("active")
    simulation = Simulation(options, settings.forgetting_tolerance, active, gamma)
    trials = simulation.all_trials(evaluations)
    table(
        ["kind", "candidate", "true gain", "earlier", "promoted (95 %)"],
        [[t.kind, t.name, f"{t.gain:+.1%}", _change(t.loss), _percent(t.promoted)] for t in trials],
    )
    counts = {"requests": options.requests, "draws": options.draws, "answers": len(held_out)}
    finish({**worst(trials), **counts, "gamma": gamma})


def _drafts(
    pair: rig.Pair, examples: Sequence[Signal], noisy: int, settings: Settings
) -> Iterable[tuple[str, nn.Module]]:
    """The active draft; two that learn, by the service's recipe and more carefully; noisy ones."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    yield "active", load(pair.files.draft, dtype=torch.float32)
    recipe = Recipe.of(settings.recipe)
    for name, rate in RATES.items():
        module = load(pair.files.draft, dtype=torch.float32)
        slower = replace(recipe, learning_rate=rate * recipe.learning_rate)
        distill(module, [examples], slower, pad_id(module))
        yield name, module
    for i in range(noisy):
        module = load(pair.files.draft, dtype=torch.float32)
        add_noise(module, NOISES[i % len(NOISES)], seed=i)
        yield f"{NOISE} {i}", module


@torch.no_grad()
def add_noise(module: nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * scale * parameter.std(correction=0))


def worst(trials: Sequence[Trials]) -> dict[str, float]:
    """The worst of each kind."""
    share = lambda promoted: promoted.value
    of = lambda *kinds: [t.promoted for t in trials if t.kind in kinds]
    false, power = max(of("null", NOISE), key=share), min(of("gain"), key=share)
    forgetting = max(of("forgetting"), key=share)
    return {
        "false_promotion": false.value,
        "false_promotion_high": false.high,
        "power": power.value,
        "power_low": power.low,
        "forgetting_promoted": forgetting.value,
        "forgetting_promoted_high": forgetting.high,
    }


def _change(loss: float | None) -> str:
    return "none" if loss is None else f"{-loss:+.0%}"


def _percent(share: Estimate) -> str:
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
