"""From the body of a request to the engine's queries: prompts, limits, routes and drafting."""

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from online.api.generation import Asked, Generation, check_lengths
from online.api.openai_format import ChoiceFormat, Envelope
from online.api.parts import ApiParts
from online.api.schemas import ChatBody, CompletionBody, GenerationBody
from online.drafters import DEFAULT
from online.errors import InvalidRequest, NotFound
from online.messages import Lenience, Query
from online.speculation import DraftingOptions, candidates

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
MAX_COPIES = 64  # seeds of a prompt's answers are consecutive; prompts are this far apart


@dataclass(frozen=True)
class QueryBuilder:
    parts: ApiParts

    def completion(self, body: CompletionBody, caller: str) -> Generation:
        max_tokens = body.max_tokens or COMPLETION_TOKENS
        asked = Asked(self._prompts(body.prompt), max_tokens, body.logprobs, chat=False)
        return self._generation(body, asked, caller)

    def chat(self, body: ChatBody, caller: str) -> Generation:
        if body.top_logprobs and not body.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        prompt = self.parts.codec.encode_chat(messages)
        room = self.parts.engine.status().max_context - len(prompt)
        max_tokens = body.max_completion_tokens or body.max_tokens or max(1, room)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._generation(body, Asked([prompt], max_tokens, logprobs, chat=True), caller)

    def _generation(self, body: GenerationBody, asked: Asked, caller: str) -> Generation:
        codec = self.parts.codec
        self._check_model(body.model)
        status = self.parts.engine.status()
        check_lengths(asked, status.max_context)
        request_id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        fingerprint = f"fp_{status.target_fingerprint}"
        envelope = Envelope(request_id, asked.chat, codec.model_name, fingerprint)
        with_ids = bool(body.return_token_ids)
        choices = ChoiceFormat(asked.chat, codec, asked.logprobs is not None, with_ids)
        queries = self._queries(body, asked, request_id, caller)
        return Generation(envelope, choices, queries, body, self._max_drafted(queries[0]))

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.parts.codec.model_name:
            message = f"the model {name!r} does not exist here"
            raise NotFound(message, param="model", code="model_not_found")

    # ── prompts ──

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self.parts.codec.encode(prompt)]
        if isinstance(prompt[0], int):
            return [self._checked_ids(prompt)]
        return [
            self.parts.codec.encode(each) if isinstance(each, str) else self._checked_ids(each)
            for each in prompt
        ]

    def _checked_ids(self, ids: Sequence[Any]) -> list[int]:
        vocab_size = self.parts.codec.vocab_size
        if max(ids) >= vocab_size:
            message = f"token id {max(ids)} is beyond the vocabulary of {vocab_size}"
            raise InvalidRequest(message, param="prompt")
        return list(ids)

    # ── queries ──

    def _queries(
        self, body: GenerationBody, asked: Asked, request_id: str, caller: str
    ) -> list[Query]:
        """`n` queries of each prompt."""
        lenience = self._lenience(body)
        named_route = self._named_route(body.metadata)
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        queries = []
        for index, prompt in enumerate(asked.prompts):
            route = named_route or self._cluster(prompt, learn=body.store is not False)
            first = self._query(body, asked, prompt, route, caller)
            for copy in range(body.n or 1):
                query_id = f"{request_id}-{index}#{copy}"
                query_seed = (seed + index * MAX_COPIES + copy) % 2**64
                queries.append(replace(first, id=query_id, seed=query_seed, lenience=lenience))
        return queries

    def _query(
        self, body: GenerationBody, asked: Asked, prompt: list[int], route: str, caller: str
    ) -> Query:
        """The query of one prompt, without id and seed."""
        settings = self.parts.settings
        options = body.speculation or DraftingOptions()
        options.check(self.parts.drafters)
        drafting = options.over(settings.drafting(route))
        return Query(
            id="",
            route=route,
            prompt_ids=tuple(prompt),
            max_tokens=asked.max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=body.top_p or 1.0,
            top_k=max(0, body.top_k or 0),
            gamma=drafting.gamma,
            drafter=drafting.drafter or DEFAULT,
            widths=tuple(drafting.widths or ()),
            replacement=bool(drafting.replacement),
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=asked.logprobs,
            store=body.store is not False,
            client=caller if settings.generation_keys else body.user or "",
        )

    def _max_drafted(self, query: Query) -> int:
        if query.widths:
            return candidates(query.widths)
        return self.parts.settings.gamma if query.gamma is None else query.gamma

    def _named_route(self, metadata: dict[str, str] | None) -> str | None:
        """The route that the request names. It can't name a cluster: prompts decide on those."""
        route = (metadata or {}).get("route")
        known = self.parts.settings.routes
        if route is not None and route not in known:
            message = f"no route named {route!r}; the routes are: {', '.join(known)}"
            raise InvalidRequest(message, param="metadata.route")
        return route

    def _cluster(self, prompt: list[int], *, learn: bool) -> str:
        if self.parts.clusters is None:
            return self.parts.settings.default_route
        return self.parts.clusters.route(prompt, learn=learn)

    def _lenience(self, body: GenerationBody) -> Lenience | None:
        asked = body.speculation.lenience if body.speculation else None
        if asked is None:
            return None
        if body.temperature == 0:
            raise InvalidRequest(
                "lenience changes nothing at temperature 0: "
                "the target's distribution has all its mass on one token",
                param="speculation.lenience",
            )
        if asked.epsilon < (floor := self.parts.settings.lenience_floor):
            exact = "; this server decodes exactly" if floor == 1 else ""
            raise InvalidRequest(
                f"an epsilon of {asked.epsilon} is below the server's "
                f"lenience floor of {floor}{exact}",
                param="speculation.lenience.epsilon",
            )
        return Lenience(asked.function, asked.epsilon)
