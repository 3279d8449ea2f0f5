"""The generation endpoints: OpenAI's completions and chat completions."""

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from online.api.answers import answer
from online.api.auth import Caller
from online.api.parts import Parts
from online.api.queries import QueryBuilder
from online.api.schemas import ChatBody, CompletionBody

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/completions", response_model=None)
async def completions(
    body: CompletionBody, request: Request, caller: Caller, parts: Parts
) -> Response:
    """OpenAI's completions. `metadata.route` names a route; `store: false` leaves no signal."""
    generation = await run_in_threadpool(QueryBuilder(parts).completion, body, caller)
    return await answer(request, parts.engine, generation)


@router.post("/chat/completions", response_model=None)
async def chat_completions(
    body: ChatBody, request: Request, caller: Caller, parts: Parts
) -> Response:
    """OpenAI's chat completions. `metadata.route` and `store` work as in completions."""
    generation = await run_in_threadpool(QueryBuilder(parts).chat, body, caller)
    return await answer(request, parts.engine, generation)
