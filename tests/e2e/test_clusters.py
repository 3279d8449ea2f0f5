"""Clusters of the default route through the service: sorted by prompt, generic until they have a draft of their own."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.stored import stored
from online.prompt_routes import PromptClusters
from online.signals import decode
from tests.e2e.conftest import Served, serve, tiny_settings
from tests.loop.conftest import until
from tests.simulation.test_clustering import prompt, stream
from tests.tiny import TinyPair


@pytest.fixture
def sorted_out(pair: TinyPair, redis_url: str, tmp_path: Path) -> Iterator[Served]:
    """A decoder that has seen two kinds of prompts before it was started again."""
    settings = tiny_settings(pair, tmp_path, redis_url, learnt_routes=2)
    clusters = PromptClusters(settings)
    for _, ids in stream(2, 700):
        clusters.route(ids, learn=True)
    clusters.save()
    with serve(settings) as served:
        yield served


def ask(served: Served, kind: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """What the answer tells of its speculation."""
    found: dict[str, Any] = served.complete(prompt(kind, random.Random(seed)), **more)  # type: ignore[arg-type]
    told: dict[str, Any] = found["metrics"]["speculative_decoding"]
    return told


def versions(told: dict[str, Any]) -> set[int]:
    return {part["version"] for part in told["draft_versions"]}


def signals(served: Served, route: str, count: int) -> list[str]:
    """Ids of the route's signals, once there are so many."""
    until(lambda: served.buffer.depth(route).signals >= count, 10)
    return sorted(decode(entry.record).request_id for entry in stored(served.buffer, route))


def test_each_kind_of_prompt_goes_to_its_cluster(sorted_out: Served) -> None:
    """The answer says which; so do the administrator's figures. Routes that are asked for stay what they are."""
    found = [
        {ask(sorted_out, kind, seed)["route"] for seed in range(6)} - {"default"} for kind in (0, 1)
    ]
    (one,), (other,) = found  # but for a stranger now and then
    assert {one, other} == {"default-c1", "default-c2"}
    before = sorted_out.route(one)["cluster_requests"]
    for named in ("default", "other"):
        assert ask(sorted_out, 0, metadata={"route": named})["route"] == named
    assert sorted_out.route(one)["cluster_requests"] == before > 300
    assert sorted_out.route(one)["cluster_of"] == "default"
    assert (
        sorted_out.route("other")["cluster_of"]
        is sorted_out.route("other")["cluster_requests"]
        is None
    )


def test_a_cluster_can_t_be_asked_for(sorted_out: Served) -> None:
    """It is for the prompt to say: other tenants' requests can't be slipped into what it learns from."""
    answer = sorted_out.post("/v1/completions", prompt="x", metadata={"route": "default-c1"})
    assert answer.status_code == 400
    assert "no route named 'default-c1'" in answer.json()["error"]["message"]


def test_a_cluster_has_the_generic_draft_until_it_has_its_own(
    sorted_out: Served, pair: TinyPair
) -> None:
    """It follows the default route's active version, then drafts by itself, and one rollback brings it back."""
    cluster = ask(sorted_out, 0)["route"]
    first = sorted_out.registry.active("default")
    assert first is not None
    assert versions(ask(sorted_out, 0)) == {first.id}
    generic = sorted_out.register(pair.draft)
    sorted_out.activate(generic)
    sorted_out.running(generic, cluster)
    assert versions(ask(sorted_out, 0)) == {generic}
    assert sorted_out.route(cluster)["generic"]

    own = sorted_out.register(pair.spoilt, cluster)
    sorted_out.activate(own, cluster)
    told = ask(sorted_out, 0)
    assert (told["route"], versions(told)) == (cluster, {own})
    assert versions(ask(sorted_out, 1)) == {generic}, "the other cluster has nothing of its own"
    assert versions(ask(sorted_out, 0, metadata={"route": "default"})) == {generic}
    assert not sorted_out.route(cluster)["generic"]

    answer = sorted_out.post(f"/admin/routes/{cluster}/rollback", reason="test")
    assert answer.status_code == 200, answer.text
    sorted_out.running(generic, cluster)
    assert versions(ask(sorted_out, 0)) == {generic}
    assert sorted_out.route(cluster)["generic"]


def test_drafts_change_no_answer(sorted_out: Served, pair: TinyPair) -> None:
    """Whoever drafts, the tokens are the target's."""
    asked = {"return_token_ids": True, "max_tokens": 40}
    ids = prompt(0, random.Random(0))
    before = sorted_out.complete(ids, **asked)  # type: ignore[arg-type]
    cluster = before["metrics"]["speculative_decoding"]["route"]
    sorted_out.activate(sorted_out.register(pair.spoilt, cluster), cluster)
    after = sorted_out.complete(ids, **asked)  # type: ignore[arg-type]
    assert after["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]


def test_the_generic_draft_learns_from_all_and_a_cluster_from_its_own(sorted_out: Served) -> None:
    """A cluster's signal is in two streams, another's and another route's in none of them; `store: false` in no one."""
    routes = [ask(sorted_out, kind)["route"] for kind in (0, 0, 1)]
    ask(sorted_out, 0, metadata={"route": "other"})
    ask(sorted_out, 0, metadata={"route": "default"})
    ask(sorted_out, 0, store=False)
    everyone = signals(sorted_out, "default", 4)
    first, second = signals(sorted_out, routes[0], 2), signals(sorted_out, routes[2], 1)
    assert (len(first), len(second), len(everyone)) == (2, 1, 4)
    assert set(first) | set(second) < set(everyone)
    assert not set(first) & set(second)
    assert not set(signals(sorted_out, "other", 1)) & set(everyone)


def test_generic_draft_is_tried_on_its_clusters(sorted_out: Served, pair: TinyPair) -> None:
    """A canary of the default route has its share of the clusters' requests, too, and they are seen."""
    canary = sorted_out.canary(pair.draft)
    until(lambda: sorted_out.route()["canary"])
    until(lambda: canary in versions(ask(sorted_out, 0, seed=random.randrange(10**6))))
    until(lambda: (seen := sorted_out.route()["canary"]["seen"]) and seen["canary"]["requests"])


def test_clusters_are_kept_when_the_decoder_ends(
    pair: TinyPair, redis_url: str, tmp_path: Path
) -> None:
    """Also those strangers that have made no cluster yet."""
    settings = tiny_settings(pair, tmp_path, redis_url, learnt_routes=2)
    with serve(settings) as served:
        ask(served, 0)
    assert PromptClusters(settings)._router.prompts == 1
