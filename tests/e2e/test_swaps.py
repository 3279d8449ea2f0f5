"""Swaps by REST under load: outputs stay the target's, acceptance follows the draft."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tests.e2e.conftest import Served
from tests.loop.conftest import until
from tests.tiny import TinyPair

PROMPTS = [f"def f{i}(" for i in range(6)]


@contextmanager
def load(served: Served, clients: int = 4) -> Iterator[list[dict[str, Any]]]:
    """Clients that ask without pause; their answers. Any failure fails the test."""
    answers: list[dict[str, Any]] = []
    ended = threading.Event()

    def client(number: int) -> None:
        while not ended.is_set():
            prompt = PROMPTS[len(answers) % len(PROMPTS)]
            answers.append({"prompt": prompt, **served.complete(prompt, max_tokens=40)})

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client, i) for i in range(clients)]
        try:
            yield answers
        finally:
            ended.set()
            for future in futures:
                future.result()


def rate(answer: dict[str, Any]) -> float:
    return float(answer["metrics"]["speculative_decoding"]["acceptance_rate"])


def mean_rate(answers: list[dict[str, Any]]) -> float:
    return sum(map(rate, answers)) / len(answers)


def versions(answer: dict[str, Any]) -> set[int]:
    return {part["version"] for part in answer["metrics"]["speculative_decoding"]["draft_versions"]}


def test_a_spoilt_draft_costs_acceptance_and_nothing_else(own: Served, pair: TinyPair) -> None:
    """Same greedy output with less acceptance, until the good draft is active again."""
    own.post("/admin/routes/default/freeze", reason="no automatic rollback here")
    expected = {
        prompt: own.complete(prompt, max_tokens=40)["choices"][0]["text"] for prompt in PROMPTS
    }
    target = own.http.get("/admin/routes").json()["target_fingerprint"]
    spoilt = own.register(pair.spoilt)
    with load(own) as answers:

        def served_by(version: int, since: int) -> list[dict[str, Any]]:
            return [a for a in answers[since:] if versions(a) == {version}]

        marks = [0]
        for version in (1, spoilt, 1):
            if version != own.route()["active_version"]:
                own.activate(version)
            marks.append(len(answers))
            until(lambda v=version, at=marks[-1]: len(served_by(v, at)) >= 12)  # type: ignore[misc]
        first, bad, good = (
            mean_rate(served_by(v, at)[:12])
            for v, at in zip((1, spoilt, 1), marks[1:], strict=True)
        )
    assert bad < first / 2
    assert good > 0.9 * first
    assert all(a["choices"][0]["text"] == expected[a["prompt"]] for a in answers)
    assert own.http.get("/admin/routes").json()["target_fingerprint"] == target
    assert own.http.get("/health").status_code == 200


def test_a_forced_spoilt_draft_is_rolled_back_by_live_acceptance(
    own: Served, pair: TinyPair
) -> None:
    """Nobody calls anything: the guard sees the fall and goes back, and says why."""
    spoilt = own.register(pair.spoilt)
    with load(own) as answers:
        until(lambda: len(answers) >= 40)
        own.activate(spoilt, reason="forced")
        own.running(1)
    newest = own.registry.activations("default")[0]
    assert (newest.kind, newest.actor, newest.from_version, newest.to_version) == (
        "auto_rollback",
        "guard",
        spoilt,
        1,
    )
    assert "is below version 1's" in newest.reason


def test_a_frozen_route_is_left_alone_and_the_finding_is_audited(
    own: Served, pair: TinyPair
) -> None:
    """Freezing means that nothing moves by itself."""
    spoilt = own.register(pair.spoilt)
    own.post("/admin/routes/default/freeze", reason="experiment")
    with load(own) as answers:
        until(lambda: len(answers) >= 40)
        own.activate(spoilt, reason="forced")
        until(lambda: [a for a in own.registry.audit() if a.action == "rollback:held"])
    assert own.route()["active_version"] == spoilt


def test_a_hundred_swaps_under_load_drop_nothing(own: Served, pair: TinyPair) -> None:
    """Back and forth; every answer whole, every swap counted, each token's version known."""
    own.post("/admin/routes/default/freeze", reason="swapping on purpose")
    other = own.register(pair.spoilt)
    with load(own) as answers:
        for i in range(100):
            own.activate(other if i % 2 == 0 else 1)
    assert all(a["choices"][0]["finish_reason"] in ("length", "stop") for a in answers)
    for answer in answers:
        parts = answer["metrics"]["speculative_decoding"]["draft_versions"]
        edges = [part["start"] for part in parts] + [parts[-1]["end"]]
        assert edges[0] == 0
        assert edges[-1] == answer["usage"]["completion_tokens"]
        assert [part["end"] for part in parts] == edges[1:]
    metrics = own.http.get("/metrics").text
    done = next(
        line
        for line in metrics.splitlines()
        if line.startswith('slipstream_swaps_total{outcome="done",route="default"}')
    )
    assert float(done.split()[-1]) >= 100
