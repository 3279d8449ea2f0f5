"""`python -m lab bench tap`: what it costs to record signals.

One engine answers the same prompts with recording and without it; which comes first alternates.
A ratio is the tokens per second with recording ÷ those without, of one repetition: 1 costs nothing.
Contexts of finished requests are not kept: the second run would find its prompts cached. The times
exclude what the recorder still has to write after the last answer; `lag_ms` reports it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lab import rig
from lab.statistics import median_ratio
from online.messages import Query

LAG_LIMIT_S = 30.0


@dataclass(frozen=True)
class Run:
    """The same prompts, answered once."""

    tokens: int
    seconds: float
    steps: int
    drafted: int
    lag_s: float  # from the last answer until its signal is written

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    @property
    def positions(self) -> int:
        """Verified positions: one for every drafted token and one more a step."""
        return self.drafted + self.steps


@dataclass(frozen=True)
class Comparison:
    """One repetition: the same prompts with recording and without, one right after the other."""

    recorded: Run
    plain: Run

    @property
    def ratio(self) -> float:
        return self.recorded.speed / self.plain.speed


class Tap:
    def __init__(self, args: argparse.Namespace, pair: rig.Pair, serving: rig.Rig) -> None:
        self._args, self._prompts, self._serving = args, pair.prompts, serving
        self._recorded: list[Run] = []
        self._sent = 0  # requests whose signals are to be written

    def compare(self, at_once: int, repetition: int) -> Comparison:
        count = self._args.rounds * at_once
        prompts = rig.dealt(self._prompts, count, repetition)
        order = (True, False) if repetition % 2 else (False, True)
        runs = {store: self._run(prompts, at_once, store) for store in order}
        return Comparison(runs[True], runs[False])

    def _run(self, prompts: Sequence[list[int]], at_once: int, store: bool) -> Run:
        queries = [self._query(i, prompt, store) for i, prompt in enumerate(prompts)]
        started = time.perf_counter()
        answers = self._serving.complete(queries, at_once)
        ended = time.perf_counter()
        self._sent += len(answers) if store else 0
        self._wait_for_recorder()
        run = Run(
            tokens=sum(len(answer.ids) for answer in answers),
            seconds=ended - started,
            steps=sum(answer.stats.steps for answer in answers),
            drafted=sum(answer.stats.drafted for answer in answers),
            lag_s=time.perf_counter() - ended,
        )
        if store:
            self._recorded.append(run)
        return run

    def _query(self, number: int, prompt: list[int], store: bool) -> Query:
        return Query(
            f"q{number}",
            rig.ROUTE,
            tuple(prompt),
            self._args.max_tokens,
            self._args.temperature,
            seed=number,
            gamma=self._args.gamma,
            store=store,
        )

    def _wait_for_recorder(self) -> None:
        """So that what it writes of one run does not slow the next."""
        deadline = time.perf_counter() + LAG_LIMIT_S
        while self._written < self._sent and time.perf_counter() < deadline:
            time.sleep(0.0005)

    @property
    def _written(self) -> int:
        return self._serving.buffer.depth(rig.ROUTE).signals

    def sizes(self) -> dict[str, float]:
        """Signals written and lost, and their bytes per emitted token and verified position."""
        size = self._serving.buffer.depth(rig.ROUTE).bytes
        tokens = sum(run.tokens for run in self._recorded)
        positions = sum(run.positions for run in self._recorded)
        return {
            "bytes_per_token": round(size / tokens, 1),
            "bytes_per_position": round(size / positions, 1),
            "signals": self._written,
            "signals_lost": self._sent - self._written,
        }


def main() -> None:
    args = _arguments()
    started = time.monotonic()
    concurrencies = [int(number) for number in args.concurrency.split(",")]
    pair = rig.pair_of(args)
    slots = max(concurrencies)
    size = {"max_tokens": args.max_tokens, "kept_contexts": 0}
    with rig.rig(pair, pair.files.draft, slots, **size) as serving:
        tap = Tap(args, pair, serving)
        found = {n: _measure(tap, n, args.repetitions) for n in concurrencies}
        figures = {**_ratios(found), **tap.sizes()}
    figures |= {"repetitions": args.repetitions, "seconds": round(time.monotonic() - started)}
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench tap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    add = parser.add_argument
    add("--repetitions", type=int, default=12)
    add(
        "--concurrency",
        default="1,8",
        help="queries in flight, comma-separated (default: %(default)s)",
    )
    add("--rounds", type=int, default=6, help="prompts of a repetition by query in flight")
    add("--max-tokens", type=int, default=64, help="of an answer that does not end before")
    add("--temperature", type=float, default=0.0)
    add("--gamma", type=int, help="drafted tokens a step (default: the engine's choice)")
    return parser.parse_args()


def _measure(tap: Tap, at_once: int, repetitions: int) -> list[Comparison]:
    tap.compare(at_once, 0)  # warms up
    found = []
    for repetition in range(repetitions):
        one = tap.compare(at_once, repetition)
        found.append(one)
        speeds = f"{one.recorded.speed:6.0f} tokens/s recorded, {one.plain.speed:6.0f} not"
        place = f"{at_once:3d} at once, {repetition + 1} of {repetitions}"
        print(f"{place}: {speeds}, ratio {one.ratio:.3f}", flush=True)
    return found


def _ratios(found: dict[int, list[Comparison]]) -> dict[str, object]:
    """The figures by number of queries in flight, after a table of them."""
    header = f"{'at once':>7} {'recorded':>9} {'not':>9} {'ratio':>6} {'95 %':>14} {'lag ms':>7}"
    print(f"\n{header} {'γ recorded, not':>16}")
    ratios, intervals, lags = {}, {}, {}
    for at_once, comparisons in found.items():
        key = str(at_once)
        ratio = median_ratio(np.array([one.ratio for one in comparisons]))
        ratios[key] = round(ratio.value, 4)
        intervals[key] = [round(ratio.low, 4), round(ratio.high, 4)]
        lags[key] = round(1000 * float(np.median([one.recorded.lag_s for one in comparisons])), 1)
        sides = [one.recorded for one in comparisons], [one.plain for one in comparisons]
        recorded, plain = (float(np.median([run.speed for run in side])) for side in sides)
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        gammas = ", ".join(f"{_gamma(side):.2f}" for side in sides)
        speeds = f"{key:>7} {recorded:9.0f} {plain:9.0f} {ratios[key]:6.3f} {interval:>14}"
        print(f"{speeds} {lags[key]:7.1f} {gammas:>16}")
    return {
        "tap_ratio": ratios,
        "tap_ratio_min": min(ratios.values()),
        "tap_ratio_interval": intervals,
        "lag_ms": lags,
    }


def _gamma(runs: Sequence[Run]) -> float:
    """Drafted tokens per step."""
    return sum(run.drafted for run in runs) / sum(run.steps for run in runs)
