"""Benchmarked systems, each in a process of its own, timed in interleaved rounds.

Processes share no threads, caches or garbage.
"""

import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import transformers

from lab.bench.cases import Block
from lab.bench.systems import Case, Outcome, Prompts
from lab.interleaved import queries_of
from lab.output import say, table
from lab.statistics import Estimate, median_ratio

TOGETHER = 32  # prompts of a round, at least, where several are answered at once
Results = dict[str, list[Outcome]]  # case → one outcome for each repetition
Makers = Mapping[str, tuple[Any, ...]]  # system → its class and arguments


class SystemProcess:
    """Runs the system that `make(*args)` returns."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        self._receive()

    def __enter__(self) -> "SystemProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.join()

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        self._pipe.send((case, prompts, seed))
        outcome: Outcome = self._receive()
        return outcome

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a benchmarked process ended; its error is above") from None


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    system = make(*args)
    pipe.send("ready")
    while True:
        pipe.send(system.run(*pipe.recv()))


def measure(
    makers: Makers,
    blocks: Sequence[Block],
    prompts: Prompts,
    *,
    repetitions: int,
    alone: int,
    rounds: int = 1,
) -> Results:
    """Runs all cases of all blocks; a first repetition warms everything up.

    Cases of a block are compared, so each of its `rounds` runs them all, in random order: a slow
    minute of the machine meets all. `alone` is the prompts of a repetition with one sequence.
    """
    rng = random.Random(0)
    results: Results = {case.name: [] for block in blocks for _, case in block}
    with ExitStack() as running:
        systems = {
            name: running.enter_context(SystemProcess(*maker)) for name, maker in makers.items()
        }
        for repetition in range(-1, repetitions):
            at = (repetition + 1) * alone % len(prompts)
            rotated = prompts[at:] + prompts[:at]
            for block in rng.sample(blocks, len(blocks)):
                outcomes = {case.name: Outcome(0, 0.0) for _, case in block}
                for number in range(rounds):
                    for who, case in rng.sample(block, len(block)):
                        count = _prompts_of_a_round(case, alone, rounds)
                        asked = queries_of(rotated, count, number)
                        seed = rng.randrange(2**30)
                        outcomes[case.name] += systems[who].run(case, asked, seed)
                for name, outcome in outcomes.items() if repetition >= 0 else ():
                    results[name].append(outcome)
            say(f"repetition {repetition + 1} of {repetitions}")
    return results


def _prompts_of_a_round(case: Case, alone: int, rounds: int) -> int:
    return max(case.at_once, TOGETHER) if case.at_once > 1 else max(1, alone // rounds)


def show(blocks: Sequence[Block], results: Results) -> None:
    rows = [_row(case, results[case.name]) for block in blocks for _, case in block]
    table(["", "tokens/s", "range", "ms/token", "τ", "outside forwards"], rows)


def _row(case: Case, outcomes: Sequence[Outcome]) -> list[str]:
    speeds = [outcome.speed for outcome in outcomes]
    median = float(np.median(speeds))
    tokens = sum(outcome.tokens for outcome in outcomes)
    steps = sum(outcome.steps for outcome in outcomes)
    return [
        case.name,
        f"{median:.0f}",
        f"{min(speeds):.0f}–{max(speeds):.0f}",
        f"{1000 * case.at_once / median:.2f}",
        f"{tokens / steps:.2f}" if steps else "",
        f"{outside_share(outcomes):.0%}" if steps else "",
    ]


def outside_share(outcomes: Sequence[Outcome]) -> float:
    """Median share of the steps' time outside model forwards."""
    return float(np.median([outcome.outside for outcome in outcomes]))


def over(results: Results, name: str, reference: str) -> Estimate:
    """Tokens per second of a case relative to another, by repetition."""
    pairs = zip(results[name], results[reference], strict=True)
    return median_ratio([own.speed / theirs.speed for own, theirs in pairs])
