"""One generation request: what it asks for, its sequences, and the format of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from online.api.openai_format import Answer, ChoiceFormat, Envelope, Json, speculation_metrics
from online.api.schemas import GenerationBody
from online.errors import InvalidRequest
from online.messages import Query


@dataclass(frozen=True)
class Asked:
    """What a request asks for, the same for both endpoints."""

    prompts: list[list[int]]
    max_tokens: int
    logprobs: int | None
    chat: bool

    @property
    def param(self) -> str:
        """The field that holds the prompts."""
        return "messages" if self.chat else "prompt"


@dataclass(frozen=True)
class Generation:
    """One request: its sequences, and the format of its answer."""

    envelope: Envelope
    choices: ChoiceFormat
    queries: list[Query]
    body: GenerationBody
    gamma: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts. Copies of a prompt count once."""
        return sum(len(query.prompt_ids) for query in self.queries[:: self.body.n or 1])

    def metrics(self, answers: Sequence[Answer]) -> Json | None:
        return speculation_metrics(answers, self.gamma, self.queries[0])


def check_lengths(asked: Asked, max_context: int) -> None:
    """Refuses empty prompts, and prompts that leave no room for the answer."""
    for prompt in asked.prompts:
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param=asked.param)
        if len(prompt) + asked.max_tokens > max_context:
            raise InvalidRequest(
                f"{len(prompt)} prompt tokens and {asked.max_tokens} tokens to generate "
                f"exceed the context of {max_context}",
                param=asked.param if len(prompt) >= max_context else "max_tokens",
                code="context_length_exceeded",
            )
