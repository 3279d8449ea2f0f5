"""The generation endpoints: check the body, make queries of it, and hand the engine's deltas back."""

import json
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from online.api import openai_format as shapes
from online.api.job import ClientGone, Job, unless_gone
from online.api.schemas import ChatBody, CompletionBody, GenerationBody
from online.errors import InvalidRequest, NotFound, SlipstreamError
from online.messages import EngineClient, Lenience, Query, TextCodec
from online.prompt_routes import PromptClusters
from online.settings import Settings
from online.speculation import DraftingOptions, candidates

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


@dataclass(frozen=True)
class Generation:
    """One request on its way: its sequences and how it wants its answer."""

    envelope: shapes.Envelope
    queries: list[Query]
    body: GenerationBody
    prompt_tokens: int
    gamma: int

    @property
    def choice_style(self) -> dict[str, Any]:
        with_logprobs = self.queries[0].logprobs is not None
        return {"with_logprobs": with_logprobs, "with_ids": bool(self.body.return_token_ids)}

    def metrics(self, answers: Sequence[shapes.Answer]) -> dict[str, Any] | None:
        return shapes.speculation_metrics(answers, self.gamma, self.queries[0])


class Generator:
    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        codec: TextCodec,
        clusters: PromptClusters | None = None,
    ) -> None:
        self._settings, self._engine, self._codec, self._clusters = (
            settings,
            engine,
            codec,
            clusters,
        )

    # ── from bodies to queries ──

    def completion(self, body: CompletionBody, caller: str) -> Generation:
        prompts = self._prompts(body.prompt)
        asked = body.max_tokens or COMPLETION_TOKENS
        return self._generation(
            body, prompts, asked, body.logprobs, caller, chat=False, param="prompt"
        )

    def chat(self, body: ChatBody, caller: str) -> Generation:
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = self._codec.encode_chat(messages)
        room = self._engine.status().max_context - len(prompt)
        asked = body.max_completion_tokens or body.max_tokens or max(1, room)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._generation(
            body, [prompt], asked, logprobs, caller, chat=True, param="messages"
        )

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self._codec.encode(prompt)]
        if isinstance(prompt[0], int):
            return [self._checked_ids(prompt)]
        return [
            self._codec.encode(p) if isinstance(p, str) else self._checked_ids(p) for p in prompt
        ]

    def _checked_ids(self, ids: Sequence[Any]) -> list[int]:
        if max(ids) >= self._codec.vocab_size:
            raise InvalidRequest(
                f"token id {max(ids)} is beyond the vocabulary of {self._codec.vocab_size}",
                param="prompt",
            )
        return list(ids)

    def _generation(
        self,
        body: GenerationBody,
        prompts: list[list[int]],
        max_tokens: int,
        logprobs: int | None,
        caller: str,
        *,
        chat: bool,
        param: str,
    ) -> Generation:
        if body.model is not None and body.model != self._codec.model_name:
            raise NotFound(
                f"the model {body.model!r} does not exist here",
                param="model",
                code="model_not_found",
            )
        limit = self._engine.status().max_context
        for prompt in prompts:
            if not prompt:
                raise InvalidRequest("the prompt has no tokens", param=param)
            if len(prompt) + max_tokens > limit:
                raise InvalidRequest(
                    f"{len(prompt)} prompt tokens and {max_tokens} tokens to generate exceed the context of {limit}",
                    param=param if len(prompt) >= limit else "max_tokens",
                    code="context_length_exceeded",
                )
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        envelope = shapes.Envelope(
            request_id,
            chat,
            self._codec.model_name,
            f"fp_{self._engine.status().target_fingerprint}",
        )
        queries = self._queries(body, request_id, prompts, max_tokens, logprobs, caller)
        return Generation(
            envelope, queries, body, sum(map(len, prompts)), self._most_drafted(queries[0])
        )

    def _queries(
        self,
        body: GenerationBody,
        request_id: str,
        prompts: list[list[int]],
        max_tokens: int,
        logprobs: int | None,
        caller: str,
    ) -> list[Query]:
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        lenience, asked = self._lenience(body), self._route(body.metadata)
        routes = [asked or self._cluster(prompt, body.store is not False) for prompt in prompts]
        drafting = [
            (body.speculation or DraftingOptions()).over(self._settings.drafting(route))
            for route in routes
        ]
        return [
            Query(
                id=f"{request_id}-{index}#{copy}",
                route=routes[index],
                prompt_ids=tuple(prompt),
                max_tokens=max_tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=body.top_p or 1.0,
                top_k=max(0, body.top_k or 0),
                seed=(seed + index * 64 + copy) % 2**64,
                gamma=drafting[index].gamma,
                drafter=drafting[index].drafter or "chain",
                widths=tuple(drafting[index].widths or ()),
                replacement=bool(drafting[index].replacement),
                lenience=lenience,
                stop=body.stops,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                ignore_eos=bool(body.ignore_eos),
                logprobs=logprobs,
                store=body.store is not False,
                client=caller if self._settings.generation_keys else body.user or "",
            )
            for index, prompt in enumerate(prompts)
            for copy in range(body.n or 1)
        ]

    def _most_drafted(self, query: Query) -> int:
        if query.widths:
            return candidates(query.widths)
        return self._settings.gamma if query.gamma is None else query.gamma

    def _route(self, metadata: dict[str, str] | None) -> str | None:
        """The route that was asked for. Clusters can't be: what is in one is for the prompts to say."""
        route = (metadata or {}).get("route")
        if route is not None and route not in self._settings.routes:
            raise InvalidRequest(
                f"no route named {route!r}; there are: {', '.join(self._settings.routes)}",
                param="metadata.route",
            )
        return route

    def _cluster(self, prompt: list[int], learn: bool) -> str:
        return (
            self._clusters.route(prompt, learn=learn)
            if self._clusters
            else self._settings.default_route
        )

    def _lenience(self, body: GenerationBody) -> Lenience | None:
        asked = body.speculation.lenience if body.speculation else None
        if asked is None:
            return None
        if body.temperature == 0:
            raise InvalidRequest(
                "lenience changes nothing at temperature 0: the target's distribution has its mass on one token",
                param="speculation.lenience",
            )
        if asked.epsilon < (floor := self._settings.lenience_floor):
            exact = "; this server decodes exactly" if floor == 1 else ""
            raise InvalidRequest(
                f"an epsilon of {asked.epsilon} is below the server's lenience floor of {floor}{exact}",
                param="speculation.lenience.epsilon",
            )
        return Lenience(asked.function, asked.epsilon)

    # ── from deltas to answers ──

    async def answer(self, request: Request, generation: Generation) -> Response:
        job = Job(self._engine, generation.queries)
        if generation.body.stream:
            # Submitted before the response starts, so that an overload is a 429 and not a broken stream.
            running = job.running()
            await running.__aenter__()
            return StreamingResponse(
                self._stream(generation, job, running), media_type="text/event-stream"
            )
        async with job.running():
            answers = await unless_gone(request, _collect(job, len(generation.queries)))
        choices = [
            shapes.full_choice(
                i, a, generation.envelope.chat, self._codec, **generation.choice_style
            )
            for i, a in enumerate(answers)
        ]
        body = generation.envelope.wrap(
            choices,
            chunk=False,
            usage=shapes.usage(generation.prompt_tokens, answers),
            metrics=generation.metrics(answers),
        )
        return JSONResponse(body)

    async def _stream(self, generation: Generation, job: Job, running: Any) -> AsyncIterator[str]:
        envelope, body = generation.envelope, generation.body
        answers = [shapes.Answer() for _ in generation.queries]
        options = body.stream_options
        try:
            if envelope.chat:
                for index in range(len(answers)):
                    yield _event(envelope.wrap([shapes.opening_choice(index)], chunk=True))
            async for index, delta in job.deltas():
                answers[index].add(delta)
                choice = shapes.chunk_choice(
                    index, delta, envelope.chat, self._codec, **generation.choice_style
                )
                more = {}
                if options and options.include_usage:
                    running_usage = shapes.usage(generation.prompt_tokens, answers)
                    more = {"usage": running_usage if options.continuous_usage_stats else None}
                yield _event(envelope.wrap([choice], chunk=True, **more))
            if body.include_usage:
                closing = shapes.usage(generation.prompt_tokens, answers)
                yield _event(
                    envelope.wrap(
                        [], chunk=True, usage=closing, metrics=generation.metrics(answers)
                    )
                )
        except SlipstreamError as error:
            yield _event(error.body())
        finally:
            # Also reached when the client is gone: the response closes this generator.
            await running.__aexit__(None, None, None)
        yield "data: [DONE]\n\n"


def router(generator: Generator, authenticated: Callable[[Request], str]) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["generation"])
    caller = Depends(authenticated)

    @routes.post("/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request, name: str = caller) -> Response:
        """OpenAI's completions. `metadata.route` chooses the route; `store: false` leaves no signal."""
        return await generator.answer(
            request, await run_in_threadpool(generator.completion, body, name)
        )

    @routes.post("/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, request: Request, name: str = caller) -> Response:
        """OpenAI's chat completions."""
        return await generator.answer(request, await run_in_threadpool(generator.chat, body, name))

    return routes


async def _collect(job: Job, count: int) -> list[shapes.Answer]:
    answers = [shapes.Answer() for _ in range(count)]
    async for index, delta in job.deltas():
        answers[index].add(delta)
    return answers


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


__all__ = ["ClientGone", "Generator", "router"]
