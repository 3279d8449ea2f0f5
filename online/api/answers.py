"""From the engine's deltas to a response: one JSON body, or a stream of events."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from online.api.generation import Generation
from online.api.job import Job, unless_gone
from online.api.openai_format import Answer, Json, opening_choice, usage
from online.errors import SlipstreamError
from online.messages import EngineClient

DONE = "data: [DONE]\n\n"


async def answer(request: Request, engine: EngineClient, generation: Generation) -> Response:
    """Runs the request's sequences and responds.

    Raises:
        Overloaded: the queue is full. Streams find out before they start, so this is a 429.
        ClientGone: the client disconnected before the answer was complete.
    """
    job = Job(engine, generation.queries)
    if generation.body.stream:
        running = AsyncExitStack()
        await running.enter_async_context(job.running())
        return StreamingResponse(_events(generation, job, running), media_type="text/event-stream")
    async with job.running():
        answers = await unless_gone(request, _collect(job, generation))
    return JSONResponse(_full_body(generation, answers))


async def _collect(job: Job, generation: Generation) -> list[Answer]:
    answers = [Answer() for _ in generation.queries]
    async for index, delta in job.deltas():
        answers[index].add(delta)
    return answers


def _full_body(generation: Generation, answers: list[Answer]) -> Json:
    return generation.envelope.wrap(
        [generation.choices.full(index, answer) for index, answer in enumerate(answers)],
        chunk=False,
        usage=usage(generation.prompt_tokens, answers),
        metrics=generation.metrics(answers),
    )


async def _events(generation: Generation, job: Job, running: AsyncExitStack) -> AsyncIterator[str]:
    try:
        async for chunk in _chunks(generation, job):
            yield _event(chunk)
    except SlipstreamError as error:
        yield _event(error.body())
    finally:
        # Also reached when the client is gone: the response closes this generator.
        await running.aclose()
    yield DONE


async def _chunks(generation: Generation, job: Job) -> AsyncIterator[Json]:
    """The bodies of a stream's events: openings, deltas, and usage at the end if asked for."""
    envelope = generation.envelope
    answers = [Answer() for _ in generation.queries]
    if envelope.chat:
        for index in range(len(answers)):
            yield envelope.wrap([opening_choice(index)], chunk=True)
    async for index, delta in job.deltas():
        answers[index].add(delta)
        choice = generation.choices.chunk(index, delta)
        yield envelope.wrap([choice], chunk=True, **_running_usage(generation, answers))
    if generation.body.include_usage:
        total = usage(generation.prompt_tokens, answers)
        metrics = generation.metrics(answers)
        yield envelope.wrap([], chunk=True, usage=total, metrics=metrics)


def _running_usage(generation: Generation, answers: list[Answer]) -> Json:
    """The `usage` field of a chunk: absent, null, or the usage so far."""
    options = generation.body.stream_options
    if options is None or not options.include_usage:
        return {}
    if not options.continuous_usage_stats:
        return {"usage": None}
    return {"usage": usage(generation.prompt_tokens, answers)}


def _event(body: Json) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
