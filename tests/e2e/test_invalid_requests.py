"""Invalid requests to the generation endpoints: a status, OpenAI's error format, the field."""

import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from tests.e2e.conftest import Served


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
def test_invalid_input_is_named(client: OpenAI, body: dict[str, object], param: str) -> None:
    """400 in OpenAI's format, with the field and the reason."""
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
    """No JSON, no object, lone surrogates, NaN, excessive nesting."""
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


def test_a_huge_body_is_refused(shared: Served) -> None:
    """With 413, before it fills the memory."""
    answer = shared.http.post("/v1/completions", content=b"x" * (9 * 2**20))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"]


def test_request_ids_are_echoed_or_made(shared: Served) -> None:
    """On errors too."""
    assert (
        shared.http.get("/health", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    )
    assert len(shared.http.get("/nowhere").headers["x-request-id"]) == 32


def test_unknown_paths_have_a_status(client: OpenAI) -> None:
    """The client gets 404, not a broken connection."""
    with pytest.raises(APIStatusError) as refused:
        client.post("/nowhere", cast_to=object)
    assert refused.value.status_code == 404
