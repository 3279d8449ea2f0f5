"""`python -m lab bench load`: a mixed load, with drafts swapped and requests cancelled under way.

Short prompts, prompts up to the context's limit, prompts with shared beginnings; greedy and
sampled; γ chosen, fixed and none; some cancelled while they wait or run. The load is steady, or
with --rate arrives as a Poisson process. A second thread stages the pair's own draft and a random
one in turn, and the engine's thread installs them between two steps.

Afterwards everyone must be answered and nothing leaked. Signals go to a buffer that is soon full,
so memory that grows is the engine's. `draft_faults` counts failures of a draft, invisible to
clients: their sequences continue without it. In float32 greedy answers are compared with those of
γ = 0. In lower precision a product's last bits depend on the batch, and with them a near-tie.

On a CPU oneDNN keeps compiled products of every shape, some hundred MiB.
ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 LRU_CACHE_CAPACITY=1 takes them out of `memory_growth`, and costs
speed.
"""

import queue
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from decoder.device.placement import stay_on_one_core
from decoder.models.loading import context_limit
from lab import rig
from lab.bench.leaks import leaked_slots, rss_mib
from lab.bench.mix import Mix
from lab.bench.swaps import StepClock, draft_folders, swap
from lab.options import PairOptions, option, parse
from lab.output import finish, say, table
from lab.streams import Load, Stream
from online.buffer import BufferLimits
from online.settings import Settings

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    requests: int = option(2000, "requests in all")
    rate: float = option(0.0, "Poisson arrivals a second; 0: half as many again as slots in flight")
    slots: int = option(16, "sequences at once")
    max_tokens: int = option(64, "of the longest answers")
    max_context: int = option(0, "tokens (default: the service's or the model's)")
    swap_every: int = option(100, "requests between two swaps; 0: no swaps")
    seed: int = option(0, "of queries and cancellations")


class Exercise:
    """The load on one engine, with swaps beneath it."""

    def __init__(self, options: Options, serving: rig.Rig, mix: Mix) -> None:
        self._options, self._serving, self._mix = options, serving, mix
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._cancel_after: dict[str, int | None] = {}
        self.clock = StepClock(serving.engine.batch)
        self.streams: list[Stream] = []
        self.pauses_s: list[float] = []
        self.rss_mib: list[float] = []
        self.seconds = 0.0

    def run(self, folders: Sequence[Path]) -> None:
        options, started = self._options, time.perf_counter()
        at_once = options.slots + options.slots // 2
        load = Load(self._serving.engine, at_once, options.rate, self._cancel)
        with ThreadPoolExecutor(1, initializer=stay_on_one_core) as pool:
            swapping = pool.submit(self._swap, folders)
            try:
                for stream in load.run(self._mix.queries(options.requests)):
                    self._ended(stream)
            finally:
                self.seconds = time.perf_counter() - started
                self._due.put(False)
            swapping.result()

    def _swap(self, folders: Sequence[Path]) -> None:
        while self._due.get():
            made = len(self.pauses_s)
            pause_s = swap(self._serving, folders[made % len(folders)], made + 1)
            self.pauses_s.append(pause_s)

    def _cancel(self, stream: Stream) -> None:
        if stream.deltas == 0:
            self._cancel_after[stream.query.id] = self._mix.cancel_after()
        if stream.deltas == self._cancel_after[stream.query.id] and not stream.reason:
            self._serving.engine.cancel(stream.query.id)

    def _ended(self, stream: Stream) -> None:
        options = self._options
        self.streams.append(stream)
        self.rss_mib.append(rss_mib())
        ended = len(self.streams)
        if options.swap_every and ended % options.swap_every == 0:
            self._due.put(True)
        if ended % max(1, options.requests // 20) == 0:
            say(f"{ended} of {options.requests} requests, {self.rss_mib[-1]:.0f} MiB")

    def compare(self) -> tuple[int, int]:
        """Greedy answers that differ from those of γ = 0, and how many were compared."""
        greedy = [s for s in self.streams if s.answered and s.query.temperature == 0]
        queries = [replace(s.query, gamma=0, store=False) for s in greedy]
        answers = self._serving.complete(queries, self._options.slots)
        pairs = zip(greedy, answers, strict=True)
        return sum(stream.ids != answer.ids for stream, answer in pairs), len(greedy)


def main() -> None:
    options = parse(Options, "bench load", __doc__)
    pair = rig.pair_of(options)
    limit = min(options.max_context or Settings().max_context, context_limit(pair.files.target))
    room = limit - options.max_tokens
    mix = Mix(pair.prompts, room, options.max_tokens, options.seed)
    sized = replace(pair, prompts=[mix.concatenated(room)])  # the engine's contexts fit its longest
    serve = rig.rig(sized, pair.files.draft, options.slots, max_tokens=options.max_tokens)
    with tempfile.TemporaryDirectory() as folder, serve as serving:
        serving.buffer.limits = BufferLimits(max(8, options.requests // 20), 2**26, 7 * 86400)
        exercise = Exercise(options, serving, mix)
        exercise.run(draft_folders(pair.files, Path(folder)))
        figures = _figures(exercise) | _swap_figures(exercise)
        figures["draft_faults"] = _draft_faults(serving)
        different, compared = exercise.compare() if pair.dtype == "float32" else (0, 0)
        figures |= {"different_answers": different, "compared_answers": compared}
        figures["slots_leaked"] = leaked_slots(serving, pair.prompts[0])
    table(["", ""], [[name, f"{value:g}"] for name, value in figures.items()])
    finish(figures)


def _figures(exercise: Exercise) -> dict[str, Any]:
    streams, rss_mib = exercise.streams, exercise.rss_mib
    reasons = Counter(stream.reason for stream in streams)
    answered = [stream for stream in streams if stream.answered]
    quarter = max(1, len(rss_mib) // 4)
    second, last = rss_mib[quarter : 2 * quarter], rss_mib[-quarter:]
    tokens = sum(len(stream.ids) for stream in streams)
    return {
        "requests": len(streams),
        "answered": len(answered),
        "cancelled": reasons["cancelled"],
        "errors": reasons["error"],
        "unanswered": reasons[""],
        "tokens": tokens,
        "tokens_per_s": tokens / exercise.seconds,
        **_percentiles("ttft_ms", [stream.first_s for stream in answered]),
        **_percentiles("itl_ms", [gap for stream in answered for gap in stream.gaps_s]),
        "memory_growth": float(np.median(last) / np.median(second or last)),
        "rss_mib": float(np.median(last)),
    }


def _swap_figures(exercise: Exercise) -> dict[str, Any]:
    pauses_s, step_s = exercise.pauses_s, float(np.median(exercise.clock.steps_s))
    versions = [len(stream.stats.versions) for stream in exercise.streams]
    return {
        "swaps": len(pauses_s),
        "requests_across_swaps": sum(count > 1 for count in versions),
        **_percentiles("pause_ms", pauses_s),
        "median_step_ms": 1000 * step_s,
        "longest_pause_steps": max(pauses_s, default=0.0) / step_s,
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = 1000 * np.percentile(seconds or [0.0], PERCENTILES)
    return {f"{name}_p{p}": float(ms) for p, ms in zip(PERCENTILES, values, strict=True)}


def _draft_faults(serving: rig.Rig) -> int:
    name, labels = "slipstream_engine_faults_total", {"part": "draft"}
    return int(serving.metrics.registry.get_sample_value(name, labels) or 0)
