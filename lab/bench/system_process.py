"""A benchmarked system in a process of its own.

It shares no threads, caches or garbage with the others.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import transformers

from lab.bench.systems import Case, Outcome, Prompts


class SystemProcess:
    """Runs the system that `make(*args)` returns."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        self._receive()

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        self._pipe.send((case, prompts, seed))
        outcome: Outcome = self._receive()
        return outcome

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

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
