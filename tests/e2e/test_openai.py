"""The `openai` client, unmodified, against the service."""

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from tests.e2e.conftest import Served

GAMMA = {"speculation": {"gamma": 4}}
MESSAGES = [{"role": "user", "content": "write a function"}]


@pytest.fixture
def client(shared: Served) -> OpenAI:
    return OpenAI(base_url=f"{shared.url}/v1", api_key="unused", max_retries=0)


def test_models(client: OpenAI) -> None:
    """The target, by its name."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "slipstream"
    with pytest.raises(NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_completion_tells_its_usage_and_acceptance(client: OpenAI) -> None:
    """Prediction tokens in usage, vLLM's and our figures in metrics."""
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


def test_chat_streams_what_it_answers_whole(client: OpenAI) -> None:
    """The pieces of a stream are the whole answer; usage and metrics come last when asked for."""
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


def test_a_second_turn_takes_the_first_answer_back(client: OpenAI) -> None:
    """The client sends an answer's message as it got it, with `refusal` and other fields that are null."""
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
    """Other clients' messages carry more of them."""
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
    """Three samples of one prompt, twice with the same seed, once with another; γ fixed, as it goes with the seed."""

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
    """As text or as token ids; each answers its own prompt."""
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
    """Streamed or not, nothing of the stop string is seen."""
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


def test_logprobs_have_openais_shapes(client: OpenAI) -> None:
    """Completions' parallel lists, chat's list of entries; log-probabilities of the target."""
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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"logprobs": 50}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 99}, "stop"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"extra_body": {"speculation": {"gamma": 99}}}, "speculation"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"metadata": {"route": "nowhere"}}}, "metadata.route"),
        ({"presence_penalty": 1}, "presence_penalty"),
    ],
)
def test_bad_input_is_named(client: OpenAI, body: dict[str, object], param: str) -> None:
    """400 in OpenAI's shape, with the field and the reason."""
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(**{"model": "tiny", "prompt": "x", **body})  # type: ignore[call-overload]
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert refused.value.body["message"]  # type: ignore[index]


def test_an_unknown_model_is_404(client: OpenAI) -> None:
    """With OpenAI's code."""
    with pytest.raises(NotFoundError) as refused:
        client.completions.create(model="gpt-9", prompt="x")
    assert refused.value.code == "model_not_found"


def test_unreadable_bodies_are_400(shared: Served) -> None:
    """Not JSON, no object, lone surrogates, NaN, nested beyond reason."""
    for body in (
        b"{",
        b"[]",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b"[" * 100_000,
    ):
        answer = shared.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, (body[:40], answer.text)
        assert answer.json()["error"]["message"]


def test_a_huge_body_is_refused_unread(shared: Served) -> None:
    """413 before it fills the memory."""
    answer = shared.http.post("/v1/completions", content=b"x" * (9 * 2**20))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]


def test_request_ids_are_echoed_or_made(shared: Served) -> None:
    """On errors too."""
    assert (
        shared.http.get("/health", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    )
    assert len(shared.http.get("/nowhere").headers["x-request-id"]) == 32


def test_errors_keep_the_clients_retry_rules(client: OpenAI) -> None:
    """The client sees a status, not a broken connection."""
    with pytest.raises(APIStatusError) as refused:
        client.post("/nowhere", cast_to=object)
    assert refused.value.status_code == 404
