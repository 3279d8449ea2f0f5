"""`python -m lab bench decode`: this engine beside `transformers`, on one pair, in one run.

All contestants answer the same prompts up to their natural end. What is compared takes turns, in random order. Printed
are medians over repetitions; ratios are medians of the repetitions' own ratios, with 95 % bootstrap intervals.
`transformers` gets the same draft, and assists at the γ that is best for it.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab import rig
from lab.bench.contestants import Case, Contestant, Continuous, Generate, Ours, Outcome
from lab.statistics import median_ratio

CONCURRENCIES = (1, 8, 32, 64)
BATCHES = (8, 32)
PEERS = (("generate", "batched"), ("continuous", "continuous"))
TOGETHER = 32  # prompts of a turn, at least, where several are answered at once
ASSISTED_GAMMAS = (1, 2, 3, 4, 6)


def blocks() -> list[list[tuple[str, Case]]]:
    """Who does what; what is compared with each other stands in one block, and runs at about the same time."""
    alone = [
        [
            ("generate", Case(f"generate, {_way(sampled)}", sampled=sampled)),
            *(
                (
                    "generate",
                    Case(
                        f"assisted γ={gamma}, {_way(sampled)}",
                        sampled=sampled,
                        gamma=gamma,
                        drafts=True,
                    ),
                )
                for gamma in ASSISTED_GAMMAS
            ),
            ("ours", Case(f"plain, 1{' sampled' * sampled}", sampled=sampled)),
            ("ours", Case(f"speculative, 1{' sampled' * sampled}", sampled=sampled, drafts=True)),
        ]
        for sampled in (False, True)
    ]
    together = [
        [
            *((who, Case(f"{name}, {n}", at_once=n)) for who, name in PEERS if n in BATCHES),
            ("ours", Case(f"plain, {n}", at_once=n)),
            ("ours", Case(f"speculative, {n}", at_once=n, drafts=True)),
        ]
        for n in CONCURRENCIES[1:]
    ]
    useless = [
        [
            ("random", Case(f"plain beside it, {n}", at_once=n)),
            ("random", Case(f"random draft, {n}", at_once=n, drafts=True)),
        ]
        for n in CONCURRENCIES
    ]
    return [*alone, *together, *useless]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab bench decode", description=__doc__)
    rig.add_arguments(parser)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="of an answer that does not end before"
    )
    parser.add_argument(
        "--alone", type=int, default=24, help="prompts of a repetition, one after another"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help=f"turns of a repetition; {TOGETHER} prompts each with several at once",
    )
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = _measure(args, rig.random_draft(rig.pair_of(args).files, Path(folder)))
    table(results)
    figures = ratios(results)
    figures["repetitions"], figures["seconds"] = args.repetitions, round(time.monotonic() - started)
    print(json.dumps(figures))


def _measure(args: argparse.Namespace, random_draft: str) -> dict[str, list[Outcome]]:
    pair, slots = rig.pair_of(args), max(CONCURRENCIES)
    contestants = {
        "generate": Contestant(Generate, pair, args.max_tokens),
        "continuous": Contestant(Continuous, pair, args.max_tokens),
        "ours": Contestant(Ours, pair, args.max_tokens, pair.files.draft, slots),
        "random": Contestant(Ours, pair, args.max_tokens, random_draft, slots),
    }
    rng = random.Random(0)
    results: dict[str, list[Outcome]] = {case.name: [] for block in blocks() for _, case in block}
    try:
        for repetition in range(-1, args.repetitions):  # the first one warms everyone up
            for block in rng.sample(blocks(), len(blocks())):
                at = (repetition + 1) * args.alone % len(pair.prompts)
                for name, outcome in _take_turns(
                    contestants, block, pair.prompts[at:] + pair.prompts[:at], args, rng
                ):
                    if repetition >= 0:
                        results[name].append(outcome)
            print(f"repetition {repetition + 1} of {args.repetitions}", flush=True)
    finally:
        for contestant in contestants.values():
            contestant.close()
    return results


def _take_turns(
    contestants: dict[str, Contestant],
    block: list[tuple[str, Case]],
    prompts: list[list[int]],
    args: argparse.Namespace,
    rng: random.Random,
) -> list[tuple[str, Outcome]]:
    """One repetition of a block in several rounds, so that a slow spell of the machine meets everyone."""
    outcomes: dict[str, Outcome] = {}
    for turn in range(args.rounds):
        for who, case in rng.sample(block, len(block)):
            count = (
                max(1, args.alone // args.rounds)
                if case.at_once == 1
                else max(case.at_once, TOGETHER)
            )
            outcome = contestants[who].run(
                case, rig.dealt(prompts, count, turn), seed=rng.randrange(2**30)
            )
            outcomes[case.name] = outcomes.get(case.name, Outcome(0, 0.0)) + outcome
    return list(outcomes.items())


def table(results: dict[str, list[Outcome]]) -> None:
    print(f"\n{'':28} {'tokens/s':>9} {'range':>13} {'ms/token':>9} {'τ':>5} {'outside':>8}")
    for block in blocks():
        for _, case in block:
            speeds, outcomes = _speeds(results[case.name]), results[case.name]
            median = float(np.median(speeds))
            steps = sum(outcome.steps for outcome in outcomes)
            tau = f"{sum(o.tokens for o in outcomes) / steps:.2f}" if steps else ""
            outside = f"{np.median([o.outside for o in outcomes]):.0%}" if steps else ""
            spread = f"{min(speeds):.0f}–{max(speeds):.0f}"
            print(
                f"{case.name:28} {median:9.0f} {spread:>13} {1000 * case.at_once / median:9.2f} {tau:>5} {outside:>8}"
            )


def ratios(results: dict[str, list[Outcome]]) -> dict[str, object]:
    """The figures that are asked for, and under `intervals` each ratio's 95 %."""
    speed = {name: _speeds(outcomes) for name, outcomes in results.items()}
    best = lambda names: max(names, key=lambda name: np.median(speed[name]))
    assisted = {
        way: best([f"assisted γ={gamma}, {way}" for gamma in ASSISTED_GAMMAS])
        for way in (_way(False), _way(True))
    }
    pairs: dict[str, tuple[str, str]] = {
        "plain_vs_generate": ("plain, 1", "generate, greedy"),
        "spec_vs_generate": ("speculative, 1", "generate, greedy"),
        "spec_vs_assisted_greedy": ("speculative, 1", assisted["greedy"]),
        "spec_vs_assisted_sampled": ("speculative, 1 sampled", assisted["sampled"]),
        "spec_vs_plain_sampled": ("speculative, 1 sampled", "plain, 1 sampled"),
        **{
            f"engine_vs_transformers_{n}": (
                f"speculative, {n}",
                best([f"batched, {n}", f"continuous, {n}"]),
            )
            for n in BATCHES
        },
    }
    by_concurrency = {
        "spec_vs_plain": [(f"speculative, {n}", f"plain, {n}") for n in CONCURRENCIES],
        "random_draft_vs_plain": [
            (f"random draft, {n}", f"plain beside it, {n}") for n in CONCURRENCIES
        ],
    }
    intervals: dict[str, object] = {}
    figures: dict[str, object] = {}
    for key, (ours, theirs) in pairs.items():
        figures[key], intervals[key] = _ratio(speed[ours], speed[theirs])
    for key, compared in by_concurrency.items():
        found = [_ratio(speed[ours], speed[theirs]) for ours, theirs in compared]
        figures[key] = {str(n): value for n, (value, _) in zip(CONCURRENCIES, found, strict=True)}
        intervals[key] = {
            str(n): spread for n, (_, spread) in zip(CONCURRENCIES, found, strict=True)
        }
    figures["outside_forward_share"] = {
        name: round(float(np.median([outcome.outside for outcome in results[name]])), 3)
        for name in ("plain, 1", "speculative, 1", "speculative, 1 sampled")
    }
    return {**figures, "peers": {**assisted}, "intervals": intervals}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float]]:
    ratio = median_ratio(np.array(ours) / np.array(theirs))
    return round(ratio.value, 3), [round(ratio.low, 3), round(ratio.high, 3)]


def _speeds(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.tokens / outcome.seconds for outcome in outcomes]


def _way(sampled: bool) -> str:
    return "sampled" if sampled else "greedy"
