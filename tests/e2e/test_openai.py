"""The unmodified `openai` client against the service."""

import pytest
from openai import NotFoundError, OpenAI

from tests.e2e.conftest import Served

GAMMA = {"speculation": {"gamma": 4}}
MESSAGES = [{"role": "user", "content": "write a function"}]


def test_models(client: OpenAI) -> None:
    """The target, by its name."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slipstream"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_completion_has_usage_and_acceptance(client: OpenAI) -> None:
    """Prediction tokens in `usage`; vLLM's figures and ours in `metrics`."""
    made = client.completions.create(
        model="tiny", prompt="def f(", max_tokens=30, temperature=0, extra_body=GAMMA
    )
    usage, metrics = made.usage, made.model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens == usage.total_tokens - usage.prompt_tokens <= 30
    accepted = usage.completion_tokens_details.accepted_prediction_tokens
    rejected = usage.completion_tokens_details.rejected_prediction_tokens
    assert accepted == metrics["num_accepted_draft_tokens"]
    assert accepted + rejected == metrics["num_draft_tokens"]  # type: ignore[operator]
    assert (
        metrics["tokens_per_target_forward"] == usage.completion_tokens / metrics["num_spec_steps"]
    )
    assert 0 < metrics["acceptance_rate"] <= 1
    versions = metrics["draft_versions"]
    assert (versions[0]["start"], versions[-1]["end"]) == (0, usage.completion_tokens)
    assert sum(map(int, metrics["acceptance_histogram"].values())) == metrics["num_spec_steps"]


def test_a_chat_stream_adds_up_to_the_whole_answer(client: OpenAI) -> None:
    """If asked for, usage and metrics come last."""
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].model_extra["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_second_turn_accepts_the_first_answer(client: OpenAI) -> None:
    """The client sends the message back unchanged, with `refusal` and other null fields."""
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5)  # type: ignore[arg-type]
    turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "and then?"}]
    second = client.chat.completions.create(model="tiny", messages=turns, max_tokens=5)  # type: ignore[arg-type]
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"audio": None, "function_call": None, "reasoning_content": None},
        {"annotations": [], "tool_calls": []},
    ],
)
def test_empty_fields_of_a_message_are_accepted(shared: Served, fields: dict[str, object]) -> None:
    """Other clients send more of them."""
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": "x", **fields},
        {"role": "user", "content": "?"},
    ]
    answered = shared.http.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 4}
    )
    assert answered.status_code == 200, answered.text


def test_n_answers_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    """Three samples of a prompt: the same seed and γ repeat them, another seed does not."""

    def sampled(seed: int) -> list[str]:
        made = client.completions.create(
            model="tiny",
            prompt="x = ",
            n=3,
            seed=seed,
            max_tokens=12,
            temperature=1,
            extra_body=GAMMA,
        )
        return [choice.text for choice in sorted(made.choices, key=lambda c: c.index)]

    assert sampled(1) == sampled(1) != sampled(2)
    assert len(set(sampled(1))) == 3


def test_several_prompts_are_several_choices(client: OpenAI) -> None:
    """As text or as token ids. Each choice answers its own prompt."""
    texts = ["a = 1", "b = 2"]
    both = client.completions.create(model="tiny", prompt=texts, max_tokens=8, temperature=0)
    apart = [
        client.completions.create(model="tiny", prompt=t, max_tokens=8, temperature=0)
        for t in texts
    ]
    assert [c.text for c in both.choices] == [a.choices[0].text for a in apart]
    ids = client.completions.create(model="tiny", prompt=[[40, 50], [60]], max_tokens=4)
    assert (len(ids.choices), ids.usage.prompt_tokens if ids.usage else 0) == (2, 3)


def test_a_stop_string_ends_the_answer_before_itself(client: OpenAI) -> None:
    """No part of it is visible, streamed or not."""
    whole = (
        client.completions.create(model="tiny", prompt="def f(", max_tokens=40, temperature=0)
        .choices[0]
        .text
    )
    stop = whole[6:9]
    asked = {
        "model": "tiny",
        "prompt": "def f(",
        "max_tokens": 40,
        "temperature": 0,
        "stop": [stop],
    }
    cut = client.completions.create(**asked)  # type: ignore[call-overload]
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (
        whole[: whole.index(stop)],
        "stop",
    )
    streamed = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))  # type: ignore[call-overload]
    assert streamed == cut.choices[0].text


def test_logprobs_have_openais_formats(client: OpenAI) -> None:
    """Parallel lists for completions, a list of entries for chat."""
    made = client.completions.create(
        model="tiny", prompt="def f(", max_tokens=6, temperature=0, logprobs=2
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == made.choices[0].text
    assert [max(top.values()) for top in logprobs.top_logprobs or []] == logprobs.token_logprobs
    assert logprobs.text_offset == [
        sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))
    ]
    chat = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(content)
    assert content[0].top_logprobs[0].token == content[0].token


def test_gamma_can_be_chosen_per_request_and_changes_no_token(client: OpenAI) -> None:
    """γ = 0 is plain decoding."""
    texts = []
    for gamma in (0, 1, 6):
        made = client.completions.create(
            model="tiny",
            prompt="def f(",
            max_tokens=30,
            temperature=0,
            extra_body={"speculation": {"gamma": gamma}},
        )
        texts.append(made.choices[0].text)
        metrics = made.model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]
        assert metrics["num_spec_tokens"] == gamma
        assert (metrics["num_draft_tokens"] == 0) == (gamma == 0)
    assert len(set(texts)) == 1
