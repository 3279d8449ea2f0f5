"""`python -m lab bench tap`: what it costs to record signals.

One engine answers the same prompts with and without recording, by turns; which goes first alternates. A ratio is the
tokens per second with recording ÷ without it, of one repetition: 1 costs nothing. Contexts of finished requests are not
kept, or whoever goes second would find its prompts encoded. What the recorder still has to write when the last answer
is there is not in that time; `lag_ms` says how much it was.
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
    """One repetition of one side."""

    tokens: int
    seconds: float
    steps: int
    drafted: int
    lag_s: float  # from the last answer until its signal is written

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Compared:
    """The same prompts on both sides, one right after the other."""

    recorded: Run
    plain: Run

    @property
    def ratio(self) -> float:
        return self.recorded.speed / self.plain.speed


class Tap:
    def __init__(self, args: argparse.Namespace, pair: rig.Pair, serving: rig.Rig) -> None:
        self._args, self._prompts, self._serving = args, pair.prompts, serving
        self.recorded_tokens = self.recorded_requests = 0

    def compare(self, at_once: int, repetition: int) -> Compared:
        count = self._args.rounds * at_once
        first = repetition * count
        prompts = [self._prompts[(first + i) % len(self._prompts)] for i in range(count)]
        order = (True, False) if repetition % 2 else (False, True)
        runs = {store: self._run(prompts, at_once, store) for store in order}
        return Compared(runs[True], runs[False])

    def _run(self, prompts: Sequence[list[int]], at_once: int, store: bool) -> Run:
        args = self._args
        queries = [
            Query(
                f"q{i}",
                rig.ROUTE,
                tuple(p),
                args.max_tokens,
                args.temperature,
                seed=i,
                gamma=args.gamma,
                store=store,
            )
            for i, p in enumerate(prompts)
        ]
        started = time.perf_counter()
        answers = self._serving.complete(queries, at_once)
        ended = time.perf_counter()
        tokens = sum(len(answer.ids) for answer in answers)
        if store:
            self.recorded_tokens += tokens
            self.recorded_requests += len(answers)
        self._settle()
        steps, drafted = (
            sum(getattr(a.stats, name) for a in answers) for name in ("steps", "drafted")
        )
        return Run(tokens, ended - started, steps, drafted, time.perf_counter() - ended)

    def _settle(self) -> None:
        """Waits for the recorder, so that what it writes of one run does not slow the next one."""
        deadline = time.perf_counter() + LAG_LIMIT_S
        while self.written < self.recorded_requests and time.perf_counter() < deadline:
            time.sleep(0.0005)

    @property
    def written(self) -> int:
        return self._serving.buffer.depth(rig.ROUTE).signals

    @property
    def bytes_per_token(self) -> float:
        return self._serving.buffer.depth(rig.ROUTE).bytes / max(1, self.recorded_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench tap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument(
        "--concurrency",
        default="1,8",
        help="queries in flight, comma-separated (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="prompts of a repetition by query in flight"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="of an answer that does not end before"
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--gamma", type=int, help="drafted tokens a step (default: what the engine finds fastest)"
    )
    args = parser.parse_args()
    started, concurrencies = time.monotonic(), [int(n) for n in args.concurrency.split(",")]
    pair = rig.pair_of(args)
    with rig.rig(
        pair, pair.files.draft, max(concurrencies), max_tokens=args.max_tokens, kept_contexts=0
    ) as serving:
        tap = Tap(args, pair, serving)
        found = {n: _measure(tap, n, args.repetitions) for n in concurrencies}
        figures = {
            **_ratios(found),
            "bytes_per_token": round(tap.bytes_per_token, 1),
            "signals": tap.written,
            "signals_lost": tap.recorded_requests - tap.written,
        }
    figures |= {"repetitions": args.repetitions, "seconds": round(time.monotonic() - started)}
    print(json.dumps(figures))


def _measure(tap: Tap, at_once: int, repetitions: int) -> list[Compared]:
    tap.compare(at_once, 0)  # warms up
    pairs = []
    for repetition in range(repetitions):
        pairs.append(tap.compare(at_once, repetition))
        one = pairs[-1]
        speeds = f"{one.recorded.speed:6.0f} tokens/s recorded, {one.plain.speed:6.0f} not"
        print(
            f"{at_once:3d} at once, {repetition + 1} of {repetitions}: {speeds}, ratio {one.ratio:.3f}",
            flush=True,
        )
    return pairs


def _ratios(found: dict[int, list[Compared]]) -> dict[str, object]:
    """The figures by number of queries in flight, after a table of them."""
    print(
        f"\n{'at once':>7} {'recorded':>9} {'not':>9} {'ratio':>6} {'95 %':>14} {'lag ms':>7} {'γ recorded, not':>16}"
    )
    ratios, intervals, lags = {}, {}, {}
    for at_once, pairs in found.items():
        key, sides = str(at_once), ([p.recorded for p in pairs], [p.plain for p in pairs])
        ratio = median_ratio(np.array([pair.ratio for pair in pairs]))
        ratios[key], *intervals[key] = (
            round(value, 4) for value in (ratio.value, ratio.low, ratio.high)
        )
        lags[key] = round(1000 * float(np.median([run.lag_s for run in sides[0]])), 1)
        recorded, plain = (float(np.median([run.speed for run in side])) for side in sides)
        gammas = ", ".join(
            f"{sum(r.drafted for r in side) / sum(r.steps for r in side):.2f}" for side in sides
        )
        low, high = intervals[key]
        print(
            f"{key:>7} {recorded:9.0f} {plain:9.0f} {ratios[key]:6.3f} {f'{low:.3f} to {high:.3f}':>14} "
            f"{lags[key]:7.1f} {gammas:>16}"
        )
    return {
        "tap_ratio": ratios,
        "tap_ratio_min": min(ratios.values()),
        "tap_ratio_interval": intervals,
        "lag_ms": lags,
    }
