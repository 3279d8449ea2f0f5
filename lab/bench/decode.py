"""`python -m lab bench decode`: this engine and `transformers` on one pair, in one run.

All systems answer the same prompts up to their natural end. Cases that are compared run in
interleaved rounds, in random order. The table has medians over repetitions; ratios are medians of
the repetitions' own ratios, with 95 % bootstrap intervals. `transformers` gets the same draft, and
its assisted generation the γ that is best for it.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import rig
from lab.bench.cases import ASSISTED_GAMMAS, BATCHES, CONCURRENCIES, Block, blocks, kind
from lab.bench.system_process import SystemProcess
from lab.bench.systems import Case, Continuous, Generate, Ours, Outcome
from lab.interleaved import queries_of
from lab.options import PairOptions, option, parse
from lab.output import finish, say, table
from lab.statistics import Estimate, median_ratio

TOGETHER = 32  # prompts of a round, at least, where several are answered at once
Results = dict[str, list[Outcome]]  # case → one outcome for each repetition


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    repetitions: int = option(9, "of every case")
    max_tokens: int = option(128, "of an answer that does not end before")
    alone: int = option(24, "prompts of a repetition, answered one after another")
    rounds: int = option(2, f"of a repetition; {TOGETHER} prompts each with several at once")


def main() -> None:
    options = parse(Options, "bench decode", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        pair = rig.pair_of(options)
        results = _measure(options, pair, rig.random_draft(pair.files, Path(folder)))
    _table(results)
    finish({**ratios(results), "repetitions": options.repetitions})


def _measure(options: Options, pair: rig.Pair, random_draft: str) -> Results:
    slots, tokens = max(CONCURRENCIES), options.max_tokens
    systems = {
        "generate": SystemProcess(Generate, pair, tokens),
        "continuous": SystemProcess(Continuous, pair, tokens),
        "ours": SystemProcess(Ours, pair, tokens, pair.files.draft, slots),
        "random": SystemProcess(Ours, pair, tokens, random_draft, slots),
    }
    rng = random.Random(0)
    results: Results = {case.name: [] for block in blocks() for _, case in block}
    try:
        for repetition in range(-1, options.repetitions):  # the first one warms everything up
            at = (repetition + 1) * options.alone % len(pair.prompts)
            prompts = pair.prompts[at:] + pair.prompts[:at]
            for block in rng.sample(blocks(), len(blocks())):
                outcomes = _run(systems, block, prompts, options, rng)
                for name, outcome in outcomes.items() if repetition >= 0 else ():
                    results[name].append(outcome)
            say(f"repetition {repetition + 1} of {options.repetitions}")
    finally:
        for system in systems.values():
            system.close()
    return results


def _run(
    systems: dict[str, SystemProcess],
    block: Block,
    prompts: list[list[int]],
    options: Options,
    rng: random.Random,
) -> dict[str, Outcome]:
    """One repetition of a block, in rounds, so that a slow minute of the machine meets all."""
    outcomes = {case.name: Outcome(0, 0.0) for _, case in block}
    for number in range(options.rounds):
        for who, case in rng.sample(block, len(block)):
            several = max(case.at_once, TOGETHER)
            count = several if case.at_once > 1 else max(1, options.alone // options.rounds)
            asked = queries_of(prompts, count, number)
            outcomes[case.name] += systems[who].run(case, asked, seed=rng.randrange(2**30))
    return outcomes


def _table(results: Results) -> None:
    cases = [case for block in blocks() for _, case in block]
    head = ["", "tokens/s", "range", "ms/token", "τ", "outside forwards"]
    table(head, [_row(case, results[case.name]) for case in cases])


def _row(case: Case, outcomes: Sequence[Outcome]) -> list[str]:
    speeds = [outcome.speed for outcome in outcomes]
    median, steps = float(np.median(speeds)), sum(outcome.steps for outcome in outcomes)
    tokens = sum(outcome.tokens for outcome in outcomes)
    return [
        case.name,
        f"{median:.0f}",
        f"{min(speeds):.0f}–{max(speeds):.0f}",
        f"{1000 * case.at_once / median:.2f}",
        f"{tokens / steps:.2f}" if steps else "",
        f"{_outside(outcomes):.0%}" if steps else "",
    ]


def ratios(results: Results) -> dict[str, object]:
    """The figures, and under `intervals` the 95 % of each ratio."""
    speeds = {name: np.array([o.speed for o in found]) for name, found in results.items()}

    def over(ours: str, theirs: str) -> Estimate:
        return median_ratio(speeds[ours] / speeds[theirs])

    def best(*names: str) -> str:
        return max(names, key=lambda name: float(np.median(speeds[name])))

    assisted = {
        name: best(*(f"assisted γ={gamma}, {name}" for gamma in ASSISTED_GAMMAS))
        for name in (kind(False), kind(True))
    }
    found = {
        "plain_vs_generate": over("plain, 1", "generate, greedy"),
        "spec_vs_generate": over("speculative, 1", "generate, greedy"),
        "spec_vs_assisted_greedy": over("speculative, 1", assisted["greedy"]),
        "spec_vs_assisted_sampled": over("speculative, 1 sampled", assisted["sampled"]),
        "spec_vs_plain_sampled": over("speculative, 1 sampled", "plain, 1 sampled"),
    }
    for n in BATCHES:
        peer = best(f"batched, {n}", f"continuous, {n}")
        found[f"engine_vs_transformers_{n}"] = over(f"speculative, {n}", peer)
    grouped = {
        "spec_vs_plain": [over(f"speculative, {n}", f"plain, {n}") for n in CONCURRENCIES],
        "random_draft_vs_plain": [
            over(f"random draft, {n}", f"plain beside it, {n}") for n in CONCURRENCIES
        ],
    }
    outside = ("plain, 1", "speculative, 1", "speculative, 1 sampled")
    return {
        **{key: ratio.value for key, ratio in found.items()},
        **{key: _by_concurrency([r.value for r in each]) for key, each in grouped.items()},
        "outside_forward_share": {name: _outside(results[name]) for name in outside},
        "peers": assisted,
        "intervals": {
            **{key: ratio.figures[1:] for key, ratio in found.items()},
            **{key: _by_concurrency([r.figures[1:] for r in e]) for key, e in grouped.items()},
        },
    }


def _by_concurrency(values: Sequence[object]) -> dict[str, object]:
    return dict(zip(map(str, CONCURRENCIES), values, strict=True))


def _outside(outcomes: Sequence[Outcome]) -> float:
    return float(np.median([outcome.outside for outcome in outcomes]))
