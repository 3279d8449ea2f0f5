"""`python -m lab bench tap`: what it costs to record signals.

One engine answers the same prompts with recording and without it; which comes first alternates.
A ratio is the tokens per second with recording ÷ those without, of one repetition: 1 costs nothing.
Contexts of finished requests are not kept: the second run would find its prompts cached. The times
exclude what the recorder still has to write after the last answer; `lag_ms` reports it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lab import rig
from lab.interleaved import Variant, interleave
from lab.options import PairOptions, option, parse
from lab.output import finish, say, table
from online.messages import Query

LAG_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    repetitions: int = option(12, "of the comparison")
    concurrency: tuple[int, ...] = option((1, 8), "queries in flight")
    rounds: int = option(6, "prompts of a repetition for each query in flight")
    max_tokens: int = option(64, "of an answer that does not end before")
    temperature: float = option(0.0, "of all queries")
    gamma: int | None = option(None, "drafted tokens a step (default: the engine's choice)")


@dataclass(kw_only=True)
class Side(Variant):
    """Decoding with recording or without, and when the recorder was done after each round."""

    store: bool
    lags_s: list[float] = field(default_factory=list)  # from the last answer to its signal


class Tap:
    def __init__(self, options: Options, pair: rig.Pair, serving: rig.Rig) -> None:
        self._options, self._prompts, self._serving = options, pair.prompts, serving
        self._recorded: list[Side] = []

    def compare(self, at_once: int) -> tuple[Side, Side]:
        """With recording and without, on the same prompts, after a round that warms up."""
        count = self._options.rounds * at_once
        for rounds in (1, self._options.repetitions):
            sides = Side(store=True), Side(store=False)
            self._recorded.append(sides[0])
            interleave(sides, self._prompts, count, at_once, rounds, self._run)
        return sides

    def _run(self, side: Side, prompts: Sequence[list[int]], at_once: int) -> None:
        queries = [self._query(i, prompt, side.store) for i, prompt in enumerate(prompts)]
        before, started = self._written, time.perf_counter()
        answers = self._serving.complete(queries, at_once)
        ended = time.perf_counter()
        side.add(answers, ended - started)
        self._wait_for_recorder(before + side.store * len(answers))
        side.lags_s.append(time.perf_counter() - ended)
        what = "recorded" if side.store else "not recorded"
        say(f"{at_once} at once, {what}: {side.speeds[-1]:.0f} tokens/s")

    def _query(self, number: int, prompt: list[int], store: bool) -> Query:
        return Query(
            f"q{number}",
            rig.ROUTE,
            tuple(prompt),
            self._options.max_tokens,
            self._options.temperature,
            seed=number,
            gamma=self._options.gamma,
            store=store,
        )

    def _wait_for_recorder(self, count: int) -> None:
        """So that what it writes of one run does not slow the next."""
        deadline = time.perf_counter() + LAG_LIMIT_S
        while self._written < count and time.perf_counter() < deadline:
            time.sleep(0.0005)

    @property
    def _written(self) -> int:
        return self._serving.buffer.depth(rig.ROUTE).signals

    def sizes(self) -> dict[str, float]:
        """Signals written and lost, and their bytes per emitted token and verified position."""
        size = self._serving.buffer.depth(rig.ROUTE).bytes
        sent = sum(side.requests for side in self._recorded)
        return {
            "bytes_per_token": size / sum(side.tokens for side in self._recorded),
            "bytes_per_position": size / sum(side.drafted + side.steps for side in self._recorded),
            "signals": self._written,
            "signals_lost": sent - self._written,
        }


def main() -> None:
    options = parse(Options, "bench tap", __doc__)
    pair = rig.pair_of(options)
    size = {"max_tokens": options.max_tokens, "kept_contexts": 0}
    with rig.rig(pair, pair.files.draft, max(options.concurrency), **size) as serving:
        tap = Tap(options, pair, serving)
        found = {str(n): tap.compare(n) for n in options.concurrency}
        figures = {**_ratios(found), **tap.sizes()}
    finish({**figures, "repetitions": options.repetitions})


def _ratios(found: Mapping[str, tuple[Side, Side]]) -> dict[str, Any]:
    """The figures by number of queries in flight, after a table of them."""
    ratios = {n: recorded.speed_over(plain) for n, (recorded, plain) in found.items()}
    lag_ms = {n: 1000 * float(np.median(side.lags_s)) for n, (side, _) in found.items()}
    rows = []
    for n, sides in found.items():
        speeds = [f"{np.median(side.speeds):.0f}" for side in sides]
        gammas = ", ".join(f"{side.drafted / side.steps:.2f}" for side in sides)
        rows.append([n, *speeds, f"{ratios[n]:.3f}", f"{lag_ms[n]:.1f}", gammas])
    head = ["at once", "recorded, tokens/s", "not", "ratio (95 %)", "lag, ms", "γ recorded, not"]
    table(head, rows)
    return {
        "tap_ratio": {n: each.value for n, each in ratios.items()},
        "tap_ratio_min": min(each.value for each in ratios.values()),
        "tap_ratio_interval": {n: each.figures[1:] for n, each in ratios.items()},
        "lag_ms": lag_ms,
    }
