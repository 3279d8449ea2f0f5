"""`python -m lab bench decode`: this engine and `transformers` on one pair, in one run.

All systems answer the same prompts up to their natural end. Cases that are compared run in
interleaved rounds, in random order. The table has medians over repetitions; ratios are medians of
the repetitions' own ratios, with 95 % bootstrap intervals. `transformers` gets the same draft, and
its assisted generation the γ that is best for it.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab import rig
from lab.bench.cases import ASSISTED_GAMMAS, BATCHES, CONCURRENCIES, blocks, kind
from lab.bench.system_process import TOGETHER, Results, measure, outside_share, over, show
from lab.bench.systems import Continuous, Generate, Ours
from lab.options import PairOptions, option, parse
from lab.output import finish
from lab.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    repetitions: int = option(9, "of every case")
    max_tokens: int = option(128, "of an answer that does not end before")
    alone: int = option(24, "prompts of a repetition, answered one after another")
    rounds: int = option(2, f"of a repetition; {TOGETHER} prompts each with several at once")


def main() -> None:
    options = parse(Options, "bench decode", __doc__)
    slots, tokens = max(CONCURRENCIES), options.max_tokens
    with tempfile.TemporaryDirectory() as folder:
        pair = rig.pair_of(options)
        random_draft = rig.random_draft(pair.files, Path(folder))
        makers = {
            "generate": (Generate, pair, tokens),
            "continuous": (Continuous, pair, tokens),
            "ours": (Ours, pair, tokens, pair.files.draft, slots),
            "random": (Ours, pair, tokens, random_draft, slots),
        }
        results = measure(
            makers,
            blocks(),
            pair.prompts,
            repetitions=options.repetitions,
            alone=options.alone,
            rounds=options.rounds,
        )
    show(blocks(), results)
    finish({**ratios(results), "repetitions": options.repetitions})


def ratios(results: Results) -> dict[str, Any]:
    """The figures, and under `intervals` the 95 % of each ratio."""
    assisted = {
        name: _fastest(results, *(f"assisted γ={gamma}, {name}" for gamma in ASSISTED_GAMMAS))
        for name in (kind(False), kind(True))
    }
    pairs = {
        "plain_vs_generate": ("plain, 1", "generate, greedy"),
        "spec_vs_generate": ("speculative, 1", "generate, greedy"),
        "spec_vs_assisted_greedy": ("speculative, 1", assisted["greedy"]),
        "spec_vs_assisted_sampled": ("speculative, 1 sampled", assisted["sampled"]),
        "spec_vs_plain_sampled": ("speculative, 1 sampled", "plain, 1 sampled"),
    }
    for n in BATCHES:
        peer = _fastest(results, f"batched, {n}", f"continuous, {n}")
        pairs[f"engine_vs_transformers_{n}"] = (f"speculative, {n}", peer)
    found = {key: over(results, *names) for key, names in pairs.items()}
    grouped = {
        "spec_vs_plain": _by_concurrency(results, "speculative", "plain"),
        "random_draft_vs_plain": _by_concurrency(results, "random draft", "plain beside it"),
    }
    values: dict[str, Any] = {key: each.value for key, each in found.items()}
    intervals: dict[str, Any] = {key: each.figures[1:] for key, each in found.items()}
    for key, by_concurrency in grouped.items():
        values[key] = {n: each.value for n, each in by_concurrency.items()}
        intervals[key] = {n: each.figures[1:] for n, each in by_concurrency.items()}
    outside = ("plain, 1", "speculative, 1", "speculative, 1 sampled")
    return {
        **values,
        "outside_forward_share": {name: outside_share(results[name]) for name in outside},
        "peers": assisted,
        "intervals": intervals,
    }


def _fastest(results: Results, *names: str) -> str:
    speed = {name: float(np.median([each.speed for each in results[name]])) for name in names}
    return max(names, key=speed.__getitem__)


def _by_concurrency(results: Results, ours: str, theirs: str) -> dict[str, Estimate]:
    return {str(n): over(results, f"{ours}, {n}", f"{theirs}, {n}") for n in CONCURRENCIES}
