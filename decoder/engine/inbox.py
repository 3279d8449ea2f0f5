"""What other threads ask of the engine: queries, cancellations, and changes between two steps."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from decoder.sequence.sequence import LiveSequence
from online.errors import Overloaded, Unavailable

R = TypeVar("R")


class Change(Generic[R]):
    """A function that runs between two steps, and the future of its result."""

    def __init__(self, work: Callable[[], R]) -> None:
        self._work = work
        self.done: Future[R] = Future()

    def run(self) -> None:
        """Never raises: an error goes into the future. A cancelled change does nothing."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self.done.set_result(self._work())
        except BaseException as error:
            self.done.set_exception(error)


class Inbox:
    """Thread-safe. Nothing here waits for the engine."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._queries: deque[LiveSequence] = deque()
        self._cancelled: set[str] = set()
        self._changes: deque[Change[Any]] = deque()
        self._wake = threading.Condition()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Queries that no step has admitted yet."""
        return len(self._queries)

    # ── other threads ──

    def put(self, seq: LiveSequence) -> None:
        """Queues a query.

        Raises:
            Unavailable: the inbox is closed.
            Overloaded: `max_waiting` queries wait already.
        """
        with self._wake:
            if self._closed:
                raise Unavailable("the engine is not running", code="engine_dead")
            count = len(self._queries)
            if count >= self._max_waiting:
                raise Overloaded(f"{count} sequences are waiting already; try again later")
            self._queries.append(seq)
            self._wake.notify()

    def cancel(self, query_id: str) -> None:
        with self._wake:
            self._cancelled.add(query_id)
            self._wake.notify()

    def change(self, work: Callable[[], R]) -> Future[R]:
        """The future is cancelled if the inbox is closed before the engine runs `work`."""
        change = Change(work)
        with self._wake:
            if self._closed:
                change.done.cancel()
            else:
                self._changes.append(change)
            self._wake.notify()
        return change.done

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()

    # ── the engine's thread ──

    def wait(self, busy: bool) -> bool:
        """Blocks while there is nothing to do, unless `busy`. False once the inbox is closed."""
        with self._wake:
            self._wake.wait_for(lambda: busy or self._closed or self._filled())
            return not self._closed

    def _filled(self) -> bool:
        return bool(self._queries or self._changes or self._cancelled)

    def run_changes(self) -> None:
        while self._changes:
            self._changes.popleft().run()

    def take_cancelled(self) -> tuple[set[str], list[LiveSequence]]:
        """Cancelled query ids, and those of their sequences that still waited here."""
        with self._wake:
            ids = self._cancelled
            self._cancelled = set()
            dropped = [seq for seq in self._queries if seq.query.id in ids]
            if dropped:
                self._queries = deque(seq for seq in self._queries if seq.query.id not in ids)
        return ids, dropped

    def take(self, count: int) -> list[LiveSequence]:
        """The oldest `count` queries, or as many as there are."""
        with self._wake:
            return [self._queries.popleft() for _ in range(min(count, len(self._queries)))]

    def drop_changes(self) -> None:
        """Cancels all changes that have not run."""
        while self._changes:
            self._changes.popleft().done.cancel()
