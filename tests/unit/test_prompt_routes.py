"""Cluster routes: thread-safe, kept over restarts, and no request fails because of them."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from online.clustering import POOL
from online.prompt_routes import SAVE_EVERY, PromptClusters
from online.settings import Settings
from tests.simulation.test_clustering import prompt, stream

ROUTES = {"default-c1", "default-c2"}


def settings(folder: Path, learnt_routes: int = 2) -> Settings:
    return Settings(data_dir=folder / "data", learnt_routes=learnt_routes)


def routes(clusters: PromptClusters, count: int, seed: int = 0) -> list[str]:
    return [clusters.route(ids, learn=True) for _, ids in stream(2, count, seed)]


def test_prompts_get_the_default_route_until_there_are_clusters(tmp_path: Path) -> None:
    """Then they get the routes of their clusters."""
    found = routes(PromptClusters(settings(tmp_path)), POOL + 100)
    assert set(found[:POOL]) == {"default"}
    assert set(found[POOL:]) - {"default"} == ROUTES


def test_without_learnt_routes_there_are_no_clusters(tmp_path: Path) -> None:
    """There is no router either."""
    assert PromptClusters.of(settings(tmp_path, 0)) is None


def test_a_cluster_keeps_its_identity_over_restarts(tmp_path: Path) -> None:
    """The state is written as soon as clusters begin, so it survives a crash."""
    before = PromptClusters(settings(tmp_path))
    routes(before, POOL)
    again = PromptClusters(settings(tmp_path))
    assert routes(again, 100, seed=1) == routes(before, 100, seed=1)
    assert again.size("default-c1") == before.size("default-c1")
    assert (again.size("default"), again.size("default-c3")) == (None, None)


def test_the_state_is_written_rarely(tmp_path: Path) -> None:
    """When clusters begin, then every `SAVE_EVERY` prompts. No temporary file stays."""
    clusters, path = PromptClusters(settings(tmp_path)), tmp_path / "data" / "clusters.npz"
    routes(clusters, POOL)
    first = path.read_bytes()
    routes(clusters, SAVE_EVERY - 1, seed=1)
    assert path.read_bytes() == first
    routes(clusters, 1, seed=2)
    assert path.read_bytes() != first
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_state_is_replaced(tmp_path: Path) -> None:
    """Clusters begin anew, and no request fails."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "clusters.npz").write_bytes(b"junk")
    assert set(routes(PromptClusters(settings(tmp_path)), POOL + 50)) == {"default", *ROUTES}


def test_without_a_writable_folder_clusters_stay_in_memory(tmp_path: Path) -> None:
    """No request fails."""
    (tmp_path / "data").write_text("a file, where a folder should be")
    clusters = PromptClusters(settings(tmp_path))
    assert set(routes(clusters, POOL + 50)) == {"default", *ROUTES}
    clusters.save()


def test_with_fewer_learnt_routes_the_other_clusters_get_the_default_route(tmp_path: Path) -> None:
    """They stay in the state and return with a higher setting."""
    routes(PromptClusters(settings(tmp_path)), POOL)
    assert set(routes(PromptClusters(settings(tmp_path, 1)), 50)) == {"default", "default-c1"}
    assert set(routes(PromptClusters(settings(tmp_path, 2)), 50)) >= ROUTES


def test_it_is_thread_safe(tmp_path: Path) -> None:
    """Every prompt is counted once."""
    clusters, rng = PromptClusters(settings(tmp_path)), random.Random(0)
    prompts = [prompt(i % 2, rng) for i in range(POOL + 400)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: clusters.route(ids, learn=True), prompts))
    assert sum(clusters.size(route) or 0 for route in ROUTES) == POOL + len(
        [each for each in found if each in ROUTES]
    )


@pytest.mark.parametrize("learn", [True, False])
def test_prompts_that_are_not_stored_make_no_clusters(tmp_path: Path, learn: bool) -> None:
    """Only learning changes the router."""
    clusters = PromptClusters(settings(tmp_path))
    found = [clusters.route(ids, learn=learn) for _, ids in stream(2, POOL + 50)]
    assert bool(set(found) & ROUTES) is learn
