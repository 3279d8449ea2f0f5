"""Clusters of the default route, through the service."""

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
def two_clusters(pair: TinyPair, redis_url: str, tmp_path: Path) -> Iterator[Served]:
    """A decoder that saw two kinds of prompts before it was restarted."""
    settings = tiny_settings(pair, tmp_path, redis_url, learnt_routes=2)
    clusters = PromptClusters(settings)
    for _, ids in stream(2, 700):
        clusters.route(ids, learn=True)
    clusters.save()
    with serve(settings) as served:
        yield served


def ask(served: Served, kind: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    """The speculation figures of an answer."""
    found: dict[str, Any] = served.complete(prompt(kind, random.Random(seed)), **more)  # type: ignore[arg-type]
    told: dict[str, Any] = found["metrics"]["speculative_decoding"]
    return told


def versions(told: dict[str, Any]) -> set[int]:
    return {part["version"] for part in told["draft_versions"]}


def signals(served: Served, route: str, count: int) -> list[str]:
    """Request ids of the route's signals, once there are `count`."""
    until(lambda: served.buffer.depth(route).signals >= count)
    return sorted(decode(entry.record).request_id for entry in stored(served.buffer, route))


def test_each_kind_of_prompt_goes_to_its_cluster(two_clusters: Served) -> None:
    """The answer and the admin endpoints show it. Named routes are not affected."""
    found = [
        {ask(two_clusters, kind, seed)["route"] for seed in range(6)} - {"default"}
        for kind in (0, 1)
    ]
    (one,), (other,) = found  # but for a stranger now and then
    assert {one, other} == {"default-c1", "default-c2"}
    before = two_clusters.route(one)["cluster_requests"]
    for named in ("default", "other"):
        assert ask(two_clusters, 0, metadata={"route": named})["route"] == named
    assert two_clusters.route(one)["cluster_requests"] == before > 300
    assert two_clusters.route(one)["cluster_of"] == "default"
    assert (
        two_clusters.route("other")["cluster_of"]
        is two_clusters.route("other")["cluster_requests"]
        is None
    )


def test_a_request_can_t_name_a_cluster(two_clusters: Served) -> None:
    """Otherwise other requests could get into what a cluster learns from."""
    answer = two_clusters.post("/v1/completions", prompt="x", metadata={"route": "default-c1"})
    assert answer.status_code == 400
    assert "no route named 'default-c1'" in answer.json()["error"]["message"]


def test_a_cluster_has_the_generic_draft_until_it_has_its_own(
    two_clusters: Served, pair: TinyPair
) -> None:
    """It follows the default route, then its own version. A rollback returns to the default."""
    cluster = ask(two_clusters, 0)["route"]
    first = two_clusters.registry.active("default")
    assert first is not None
    assert versions(ask(two_clusters, 0)) == {first.id}
    generic = two_clusters.register(pair.draft)
    two_clusters.activate(generic)
    two_clusters.running(generic, cluster)
    assert versions(ask(two_clusters, 0)) == {generic}
    assert two_clusters.route(cluster)["generic"]

    own = two_clusters.register(pair.spoilt, cluster)
    two_clusters.activate(own, cluster)
    told = ask(two_clusters, 0)
    assert (told["route"], versions(told)) == (cluster, {own})
    assert versions(ask(two_clusters, 1)) == {generic}, "the other cluster has nothing of its own"
    assert versions(ask(two_clusters, 0, metadata={"route": "default"})) == {generic}
    assert not two_clusters.route(cluster)["generic"]

    answer = two_clusters.post(f"/admin/routes/{cluster}/rollback", reason="test")
    assert answer.status_code == 200, answer.text
    two_clusters.running(generic, cluster)
    assert versions(ask(two_clusters, 0)) == {generic}
    assert two_clusters.route(cluster)["generic"]


def test_drafts_change_no_answer(two_clusters: Served, pair: TinyPair) -> None:
    """The tokens are the target's with every draft."""
    asked = {"return_token_ids": True, "max_tokens": 40}
    ids = prompt(0, random.Random(0))
    before = two_clusters.complete(ids, **asked)  # type: ignore[arg-type]
    cluster = before["metrics"]["speculative_decoding"]["route"]
    two_clusters.activate(two_clusters.register(pair.spoilt, cluster), cluster)
    after = two_clusters.complete(ids, **asked)  # type: ignore[arg-type]
    assert after["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]


def test_the_generic_draft_learns_from_all_clusters(two_clusters: Served) -> None:
    """A cluster's signals are also in the default route's buffer, and in no other."""
    routes = [ask(two_clusters, kind)["route"] for kind in (0, 0, 1)]
    ask(two_clusters, 0, metadata={"route": "other"})
    ask(two_clusters, 0, metadata={"route": "default"})
    ask(two_clusters, 0, store=False)
    everyone = signals(two_clusters, "default", 4)
    first, second = signals(two_clusters, routes[0], 2), signals(two_clusters, routes[2], 1)
    assert (len(first), len(second), len(everyone)) == (2, 1, 4)
    assert set(first) | set(second) < set(everyone)
    assert not set(first) & set(second)
    assert not set(signals(two_clusters, "other", 1)) & set(everyone)


def test_a_canary_of_the_default_route_drafts_for_its_clusters(
    two_clusters: Served, pair: TinyPair
) -> None:
    """For a share of their requests, which the test counts."""
    canary = two_clusters.canary(pair.draft)
    until(lambda: two_clusters.route()["canary"])
    until(lambda: canary in versions(ask(two_clusters, 0, seed=random.randrange(10**6))))
    until(lambda: (seen := two_clusters.route()["canary"]["seen"]) and seen["canary"]["requests"])


def test_clusters_are_saved_when_the_decoder_ends(
    pair: TinyPair, redis_url: str, tmp_path: Path
) -> None:
    """Also outliers that have no cluster yet."""
    settings = tiny_settings(pair, tmp_path, redis_url, learnt_routes=2)
    with serve(settings) as served:
        ask(served, 0)
    assert PromptClusters(settings)._router.prompts == 1
