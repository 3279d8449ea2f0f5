"""`python -m lab bench swap`: drafts swapped under load, a hundred times.

Streams are always running while a second thread stages weights and the engine's thread installs them, as
`decoder/rollout/swapper.py` has it: the pair's draft and one that knows nothing, by turns. `pause` is the install on the engine's
thread. A gap is the time between the ends of two steps: one that contains a swap holds the pause, the step after it,
and what the staging thread took of the machine.

All of it runs once more in float32, where the answers of greedy queries must be those of γ = 0: in lower precisions a
product's last bits depend on how many rows share it, and with them a near-tie.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decoder.device.placement import stay_on_one_core
from decoder.engine.batch import Batch
from lab import rig
from lab.bench.load import Stream, Swap, draft_folders, keep_busy, swaps
from lab.statistics import Floats
from online.messages import Query

NAP_S = 0.002  # between looks at how many steps have run
STEPS_LIMIT_S = 60.0


class StepClock:
    """When each of a batch's steps began and ended; it takes the place of the batch's own `step`."""

    def __init__(self, batch: Batch) -> None:
        self.spans: list[tuple[float, float]] = []
        self._step = batch.step
        batch.step = self  # type: ignore[method-assign]

    def __call__(self) -> None:
        began = time.perf_counter()
        self._step()
        self.spans.append((began, time.perf_counter()))


@dataclass(frozen=True)
class Outcome:
    """What one run of the load under swaps left behind."""

    streams: list[Stream]
    swaps: list[Swap]
    spans: list[tuple[float, float]]
    different: int = 0  # greedy answers that γ = 0 gives otherwise
    compared: int = 0


class Exercise:
    """The load on one engine, and swaps under it."""

    def __init__(self, args: argparse.Namespace, pair: rig.Pair, serving: rig.Rig) -> None:
        self._args, self._prompts, self._serving = args, pair.prompts, serving
        self._clock = StepClock(serving.engine.batch)

    def run(self, folders: Sequence[Path], *, compare: bool) -> Outcome:
        engine = self._serving.engine
        with ThreadPoolExecutor(1, initializer=stay_on_one_core) as pool:
            swapping = pool.submit(swaps, engine, folders, self._due)
            streams = list(keep_busy(engine, self._queries(swapping), self._args.streams))
            made, spans = swapping.result(), list(self._clock.spans)
        different, compared = self._compare(streams) if compare else (0, 0)
        return Outcome(streams, made, spans, different, compared)

    def _due(self, made: int) -> bool:
        """Steps run between two swaps, or the second one would only undo the first."""
        wanted, deadline = (
            len(self._clock.spans) + self._args.steps_between,
            time.monotonic() + STEPS_LIMIT_S,
        )
        while made < self._args.swaps and len(self._clock.spans) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError("the engine has stopped stepping")
            time.sleep(NAP_S)
        return made < self._args.swaps

    def _queries(self, swapping: "Future[list[Swap]]") -> Iterator[Query]:
        """One prompt after another until the swaps are done; every other one greedy, the others sampled."""
        i = 0
        while not swapping.done():
            yield self._query(i, self._args.gamma)
            i += 1

    def _query(self, i: int, gamma: int) -> Query:
        prompt = tuple(self._prompts[i % len(self._prompts)])
        return Query(
            str(i), rig.ROUTE, prompt, self._args.max_tokens, float(i % 2), seed=i, gamma=gamma
        )

    def _compare(self, streams: Sequence[Stream]) -> tuple[int, int]:
        """How many greedy answers γ = 0 gives otherwise, and how many were compared."""
        greedy = [s for s in streams if s.query.temperature == 0 and s.reason in ("stop", "length")]
        queries = [self._query(int(s.query.id), gamma=0) for s in greedy]
        plain = self._serving.complete(queries, self._args.streams)
        return sum(s.ids != answer.ids for s, answer in zip(greedy, plain, strict=True)), len(
            greedy
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench swap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--streams", type=int, default=8, help="queries always in flight")
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="of an answer that does not end before"
    )
    parser.add_argument(
        "--gamma",
        type=int,
        default=4,
        help="drafted tokens a step: fixed, so that every draft drafts",
    )
    parser.add_argument(
        "--steps-between", type=int, default=5, help="steps between two swaps, at least"
    )
    args = parser.parse_args()
    started, pair = time.monotonic(), rig.pair_of(args)
    with tempfile.TemporaryDirectory() as folder:
        folders = draft_folders(pair.files, Path(folder))
        if pair.dtype == "float32":
            timed = exact = _exercise(args, pair, folders, compare=True)
        else:
            timed = _exercise(args, pair, folders, compare=False)
            exact = _exercise(args, replace(pair, dtype="float32"), folders, compare=True)
    figures = _figures(timed, exact)
    _table(figures)
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}))


def _exercise(
    args: argparse.Namespace, pair: rig.Pair, folders: Sequence[Path], *, compare: bool
) -> Outcome:
    with rig.rig(pair, pair.files.draft, args.streams, max_tokens=args.max_tokens) as serving:
        outcome = Exercise(args, pair, serving).run(folders, compare=compare)
    print(f"{pair.dtype}: {len(outcome.streams)} requests, {len(outcome.swaps)} swaps", flush=True)
    return outcome


def _figures(timed: Outcome, exact: Outcome) -> dict[str, float]:
    streams = timed.streams if timed is exact else timed.streams + exact.streams
    spans_S2 = np.array(timed.spans)
    taken = 1000 * (spans_S2[:, 1] - spans_S2[:, 0])
    median, pauses = (
        float(np.median(taken)),
        np.array([1000 * swap.pause_s for swap in timed.swaps]),
    )
    staging = taken[beside(spans_S2, timed.swaps)]
    around, others = gaps(spans_S2[:, 1], timed.swaps)
    return {
        "dropped": sum(stream.reason not in ("stop", "length") for stream in streams),
        "requests": len(streams),
        "requests_across_swaps": sum(len(stream.stats.versions) > 1 for stream in streams),
        "swaps": len(timed.swaps),
        "different_answers": exact.different,
        "compared_answers": exact.compared,
        "pause_ms_p50": round(float(np.percentile(pauses, 50)), 3),
        "pause_ms_p99": round(float(np.percentile(pauses, 99)), 3),
        "median_step_ms": round(median, 3),
        "median_step_ms_while_staging": round(
            float(np.median(staging if len(staging) else taken)), 3
        ),
        "longest_pause_steps": round(float(pauses.max()) / median, 3),
        "longest_gap_steps": round(1000 * max(around, default=0.0) / median, 3),
        "median_gap_steps": round(1000 * float(np.median(around or [0.0])) / median, 3),
        "longest_gap_steps_without_swap": round(1000 * max(others, default=0.0) / median, 3),
    }


def gaps(ends: Floats, swaps: Sequence[Swap]) -> tuple[list[float], list[float]]:
    """Times between the ends of two steps: those that contain a swap, and the others."""
    between = np.diff(ends)
    with_swap = {
        int(i) - 1
        for i in np.searchsorted(ends, [swap.began_s for swap in swaps])
        if 0 < i < len(ends)
    }
    sides: tuple[list[float], list[float]] = ([], [])
    for i, seconds in enumerate(between):
        sides[i not in with_swap].append(float(seconds))
    return sides


def beside(spans_S2: Floats, swaps: Sequence[Swap]) -> NDArray[np.bool_]:
    """Whether each step ran while weights were staged."""
    found = np.zeros(len(spans_S2), bool)
    for swap in swaps:
        found |= (spans_S2[:, 1] > swap.staging_s) & (spans_S2[:, 0] < swap.began_s)
    return found


def _table(figures: dict[str, float]) -> None:
    for title, keys in (
        ("requests, of them dropped", ("requests", "dropped")),
        ("requests that more than one draft served", ("requests_across_swaps",)),
        (
            "greedy answers compared with γ = 0, different",
            ("compared_answers", "different_answers"),
        ),
        ("pause, ms: median, 99th percentile", ("pause_ms_p50", "pause_ms_p99")),
        ("step, ms: median, while staging", ("median_step_ms", "median_step_ms_while_staging")),
        ("longest pause, in steps", ("longest_pause_steps",)),
        ("gap with a swap, in steps: median, longest", ("median_gap_steps", "longest_gap_steps")),
        ("longest gap without one, in steps", ("longest_gap_steps_without_swap",)),
    ):
        print(f"{title:48} {'  '.join(f'{figures[key]:g}' for key in keys)}")
