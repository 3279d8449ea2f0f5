"""Bodies of the generation endpoints, validated. Unknown fields are refused by name.

Some fields are not supported, but clients send them anyway. Their neutral value is accepted; any
other value is an error.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from online.messages import LenienceFunction
from online.speculation import DraftingOptions


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode text at character {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Field(min_length=1, max_length=64)  # bounds of a list of prompts
Body = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = Body
    include_usage: bool = False
    continuous_usage_stats: bool = False


class LenienceOptions(BaseModel):
    model_config = Body
    function: LenienceFunction = Field(
        description="replaces the target's p: lin: p / epsilon, sq: p / epsilon², exp: p^epsilon"
    )
    epsilon: float = Field(gt=0, le=1, description="1: exact; at least the server's lenience_floor")


class Speculation(DraftingOptions):
    lenience: LenienceOptions | None = Field(
        None,
        description="lossy: accepts drafted tokens more often than is exact; null: exact",
    )


class GenerationBody(BaseModel):
    """The fields of both generation endpoints. None means "not given": clients send nulls."""

    model_config = Body
    model: Text | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=64)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="false: the request is not recorded")
    metadata: dict[Text, Text] | None = Field(
        None, max_length=16, description='"route" names the route'
    )
    user: Text | None = None
    speculation: Speculation | None = None
    return_token_ids: bool | None = None
    # Only neutral values are accepted.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    suffix: Text | None = None
    echo: bool | None = None

    @field_validator("presence_penalty", "frequency_penalty", "min_p", "min_tokens")
    @classmethod
    def _zero(cls, value: float | None) -> float | None:
        return _neutral(value, 0)

    @field_validator("repetition_penalty", "best_of")
    @classmethod
    def _one(cls, value: float | None) -> float | None:
        return _neutral(value, 1)

    @field_validator("logit_bias", "suffix", "echo")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported")
        return value

    @field_validator("stop")
    @classmethod
    def _stops_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and "" in value:
            raise ValueError("a stop string can't be empty")
        return value or None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    prompt: Text | TokenIds | Annotated[list[Text], Prompts] | Annotated[list[TokenIds], Prompts]
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


class TextPart(BaseModel):
    model_config = Body
    type: Literal["text"]
    text: Text


Empty = Annotated[list[Any], Field(max_length=0)]


class Message(BaseModel):
    model_config = Body
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None
    # Clients send an answer's message back unchanged. These must be empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: None = None
    annotations: Empty | None = None
    tool_calls: Empty | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


def _neutral(value: float | None, neutral: float) -> float | None:
    if value is not None and value != neutral:
        raise ValueError(f"is not supported; leave it out or send {neutral}")
    return value
