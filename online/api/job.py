"""One HTTP request's sequences in the engine: submit, receive deltas, cancel if the client goes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request

from online.errors import Unavailable
from online.messages import Delta, EngineClient, Query

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


class Job:
    def __init__(self, engine: EngineClient, queries: Sequence[Query]) -> None:
        self._engine = engine
        self._queries = queries
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open = set(range(len(queries)))

    @asynccontextmanager
    async def running(self) -> "AsyncIterator[Job]":
        """Submits every sequence; at the end, cancels those that have not finished."""
        loop = asyncio.get_running_loop()
        submitted = []
        try:
            for index, query in enumerate(self._queries):
                self._engine.submit(query, self._receiver(loop, index))
                submitted.append(index)
            yield self
        finally:
            for index in submitted:
                if index in self._open:
                    self._engine.cancel(self._queries[index].id)

    def _receiver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Delta], None]:
        """Passes the deltas of one sequence from the engine's thread to the event loop."""

        def receive(delta: Delta) -> None:
            loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

        return receive

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(sequence, delta) in order of arrival, until every sequence has finished.

        Raises:
            Unavailable: the engine failed on a sequence.
        """
        while self._open:
            index, delta = await self._deltas.get()
            if delta.finish_reason:
                self._open.discard(index)
            if delta.finish_reason == "error":
                raise Unavailable(delta.error, code="engine_error")
            yield index, delta


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, or drops it if the client disconnects first.

    Behind middleware `request.is_disconnected` misses that; reading the next message does not.

    Raises:
        ClientGone: the client disconnected first.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientGone
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
