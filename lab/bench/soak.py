"""`python -m lab bench soak`: a long mixed load, after which nothing may have leaked and everyone was answered.

Short prompts, prompts up to the context's limit, prompts with shared beginnings; greedy and sampled; γ chosen, fixed
and none; recorded or not; some cancelled at a random moment, while they wait or while they run; drafts swapped under
way. Signals go to a buffer that is soon full, so that memory that grows is the engine's. `draft_faults` are failures of
a draft that no client saw, because its rows went on without it.

On a CPU oneDNN keeps compiled products of every shape it has met, thousands of them: some hundred MiB until they are
full. ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 LRU_CACHE_CAPACITY=1 takes them out of `memory_growth`, and out of the speed.
"""

import argparse
import json
import queue
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from decoder.device.placement import stay_on_one_core
from decoder.models.loading import context_limit
from lab import rig
from lab.bench.load import Stream, draft_folders, keep_busy, swaps
from online.buffer import BufferLimits
from online.messages import MAX_GAMMA, Query
from online.settings import Settings

LONG, SHARED = (
    0.08,
    0.25,
)  # shares of prompts that run up to the context's limit, and that begin alike
HEADS = 3  # beginnings that are shared
CANCELLED = 0.05
RECORDED = 0.7
IDLE_LIMIT_S = 10.0


class Mix:
    """Queries of every kind, the same for the same seed."""

    def __init__(self, prompts: Sequence[list[int]], room: int, max_tokens: int, seed: int) -> None:
        self._prompts, self._room, self._max_tokens = prompts, room, max_tokens
        self._rng = random.Random(seed)
        self._heads = [self.run_on(room // 4) for _ in range(HEADS)]

    def queries(self, count: int) -> Iterator[Query]:
        for i in range(count):
            yield self._query(i)

    def cancel_after(self) -> int | None:
        """The number of deltas after which a request is cancelled; mostly never."""
        return self._rng.choice([0, 0, 1, 4, 16]) if self._rng.random() < CANCELLED else None

    def run_on(self, tokens: int) -> list[int]:
        """Prompts one after another, up to exactly so many tokens."""
        joined: list[int] = []
        while len(joined) < tokens:
            joined += self._rng.choice(self._prompts)
        return joined[:tokens]

    def _prompt(self) -> list[int]:
        kind = self._rng.random()
        if kind < LONG:
            return self.run_on(
                self._rng.choice([self._room, self._rng.randint(self._room // 2, self._room)])
            )
        head = self._rng.choice(self._heads) if kind < LONG + SHARED else []
        return (head + self._rng.choice(self._prompts))[: self._room]

    def _query(self, i: int) -> Query:
        choice = self._rng.choice
        return Query(
            str(i),
            rig.ROUTE,
            tuple(self._prompt()),
            max_tokens=choice([self._max_tokens, self._rng.randint(1, self._max_tokens)]),
            temperature=choice([0.0, 0.7, 1.0]),
            top_p=choice([1.0, 0.9]),
            top_k=choice([0, 40]),
            seed=i,
            gamma=choice([None, None, None, 0, 1, 4, MAX_GAMMA]),
            ignore_eos=choice([True, False]),
            logprobs=choice([*[None] * 9, 5]),
            store=self._rng.random() < RECORDED,
        )


class Soak:
    def __init__(self, args: argparse.Namespace, serving: rig.Rig, mix: Mix) -> None:
        self._args, self._serving, self._mix = args, serving, mix
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._cancel_after: dict[str, int | None] = {}
        self._started = time.monotonic()
        self.reasons: Counter[str] = Counter()
        self.rss_mib: list[float] = []
        self.tokens = self.swaps = 0

    def run(self, folders: Sequence[Path]) -> None:
        engine, args = self._serving.engine, self._args
        with ThreadPoolExecutor(1, initializer=stay_on_one_core) as pool:
            swapping = pool.submit(swaps, engine, folders, lambda made: self._due.get())
            try:
                at_once = args.slots + args.slots // 2
                for stream in keep_busy(
                    engine, self._mix.queries(args.requests), at_once, self._cancel
                ):
                    self._ended(stream)
            finally:
                self._due.put(False)
            self.swaps = len(swapping.result())

    def _cancel(self, stream: Stream) -> None:
        if stream.deltas == 0:
            self._cancel_after[stream.query.id] = self._mix.cancel_after()
        if stream.deltas == self._cancel_after[stream.query.id] and not stream.reason:
            self._serving.engine.cancel(stream.query.id)

    def _ended(self, stream: Stream) -> None:
        del self._cancel_after[stream.query.id]
        self.reasons[stream.reason] += 1
        self.tokens += len(stream.ids)
        self.rss_mib.append(rss_mib())
        ended, every = self.reasons.total(), max(1, self._args.requests // 20)
        if ended % self._args.swap_every == 0:
            self._due.put(True)
        if ended % every == 0:
            self._say(ended)

    def _say(self, ended: int) -> None:
        spent = time.monotonic() - self._started
        states = ", ".join(
            f"{count} {reason or 'unanswered'}" for reason, count in sorted(self.reasons.items())
        )
        speed = f"{self.tokens / spent:.0f} tokens/s, {self.rss_mib[-1]:.0f} MiB"
        print(f"[{spent:5.0f} s] {ended} of {self._args.requests}: {speed}; {states}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rig.add_arguments(parser)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument(
        "--slots", type=int, default=16, help="half as many again are in flight, and wait"
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="of the longest answers")
    parser.add_argument(
        "--max-context", type=int, default=0, help="tokens (default: the service's, or the model's)"
    )
    parser.add_argument("--swap-every", type=int, default=100, help="requests between two swaps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started, pair = time.monotonic(), rig.pair_of(args)
    room = (
        min(args.max_context or Settings().max_context, context_limit(pair.files.target))
        - args.max_tokens
    )
    mix = Mix(pair.prompts, room, args.max_tokens, args.seed)
    sized = replace(
        pair, prompts=[mix.run_on(room)]
    )  # a rig's contexts are as long as its longest prompt needs
    with (
        tempfile.TemporaryDirectory() as folder,
        rig.rig(sized, pair.files.draft, args.slots, max_tokens=args.max_tokens) as serving,
    ):
        serving.buffer.limits = BufferLimits(max(8, args.requests // 20), 2**26, 7 * 86400)
        soak = Soak(args, serving, mix)
        soak.run(draft_folders(pair.files, Path(folder)))
        leaked = _leaked(serving, pair.prompts[0])
        faults = serving.metrics.registry.get_sample_value(
            "slipstream_engine_faults_total", {"part": "draft"}
        )
        figures = _figures(soak, leaked, int(faults or 0))
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}))


def _figures(soak: Soak, leaked: int, draft_faults: int) -> dict[str, object]:
    reasons, quarter = soak.reasons, max(1, len(soak.rss_mib) // 4)
    second, last = (
        float(np.median(part))
        for part in (soak.rss_mib[quarter : 2 * quarter], soak.rss_mib[-quarter:])
    )
    return {
        "requests": reasons.total(),
        "answered": reasons["stop"] + reasons["length"],
        "cancelled": reasons["cancelled"],
        "errors": reasons["error"],
        "unanswered": reasons[""],
        "draft_faults": draft_faults,
        "swaps": soak.swaps,
        "slots_leaked": leaked,
        "memory_growth": round(last / second, 4),
        "rss_mib": round(last, 1),
        "tokens": soak.tokens,
    }


def _leaked(serving: rig.Rig, prompt: list[int]) -> int:
    """Rows and waiting queries of an engine that has answered everyone, and slots that it can't fill any more."""
    engine, slots = serving.engine, serving.engine.limits.slots
    deadline = time.monotonic() + IDLE_LIMIT_S
    while (left := engine.running + engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left + slots - _together(serving, prompt, slots)


def _together(serving: rig.Rig, prompt: list[int], slots: int) -> int:
    """Of as many requests as there are slots: the number answered, or that of those that ran together if it is less."""
    engine, running = serving.engine, [0]
    queries = (
        Query(
            f"after {i}",
            rig.ROUTE,
            tuple(prompt),
            32,
            temperature=0.0,
            gamma=0,
            ignore_eos=True,
            store=False,
        )
        for i in range(slots)
    )
    streams = list(keep_busy(engine, queries, slots, lambda stream: running.append(engine.running)))
    return min(max(running), sum(stream.reason == "length" for stream in streams))


def rss_mib() -> float:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")
