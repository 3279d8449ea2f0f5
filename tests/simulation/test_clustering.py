"""Clusters of prompts, learnt while prompts arrive."""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from online import clustering
from online.clustering import POOL, ClusterRouter
from online.prompt_features import features, groups

TEMPLATE_START, TEMPLATE_END = list(range(10)), list(range(10, 20))


def prompt(kind: int, rng: random.Random, tokens: int = 15) -> list[int]:
    """A template around words of this kind and words of every kind."""
    own, common = range(100 + 60 * kind, 160 + 60 * kind), range(40, 90)
    return [
        *TEMPLATE_START,
        *(rng.choice(own if rng.random() < 0.6 else common) for _ in range(tokens)),
        *TEMPLATE_END,
    ]


def stream(kinds: int, count: int, seed: int = 0) -> Iterator[tuple[int, list[int]]]:
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.randrange(kinds)
        yield kind, prompt(kind, rng)


def damaged() -> bytes:
    """A state with an inverted byte in its arrays."""
    state = bytearray(trained(count=50).to_bytes())
    state[len(state) // 2] ^= 0xFF
    return bytes(state)


def trained(max_clusters: int = 4, kinds: int = 2, count: int = 700) -> ClusterRouter:
    made = ClusterRouter(max_clusters)
    for _, ids in stream(kinds, count):
        made.assign(ids)
    return made


def purity(made: ClusterRouter, kinds: int) -> float:
    """Share of new prompts whose kind is the most frequent one of their cluster."""
    found: dict[int | None, Counter[int]] = {}
    for kind, ids in stream(kinds, 300, seed=1):
        found.setdefault(made.assign(ids), Counter())[kind] += 1
    found.pop(None, None)
    frequent = [kinds.most_common(1)[0][1] for kinds in found.values()]
    return sum(frequent) / 300


def test_two_kinds_of_prompts_get_two_clusters() -> None:
    """Although half of every prompt is the same template."""
    made = trained(max_clusters=2)
    assert len(made.sizes) == 2
    assert purity(made, 2) > 0.95


def test_the_first_prompts_get_no_cluster() -> None:
    """Clusters begin once the pool is full."""
    made = ClusterRouter(2)
    assert {made.assign(ids) for _, ids in stream(2, POOL)} == {None}
    assert sum(made.sizes) == POOL


def test_a_common_template_does_not_make_prompts_similar() -> None:
    """Not even 200 tokens of it around eight words."""
    made, rng, found = ClusterRouter(2), random.Random(0), []
    for i in range(POOL + 200):
        words = prompt(i % 2, rng, tokens=8)[10:-10]
        found.append(made.assign([*range(1000, 1100), *words, *range(1100, 1200)]))
    late = [
        {cluster for cluster in found[POOL + kind :: 2] if cluster is not None} for kind in (0, 1)
    ]
    assert all(len(each) == 1 for each in late)
    assert late[0] != late[1]


def test_there_are_never_too_many_clusters() -> None:
    """Eight kinds of prompts have room for three clusters."""
    made = trained(max_clusters=3, kinds=8, count=3000)
    assert len(made.sizes) <= 3
    assert len(made._outliers) < POOL


def test_a_new_kind_becomes_a_cluster_while_there_is_room() -> None:
    """Its prompts are outliers at first. A full pool of them gets a cluster."""
    made = trained(max_clusters=4, kinds=1)
    before, rng = len(made.sizes), random.Random(5)
    assert before < 4
    newcomers = [made.assign(prompt(7, rng)) for _ in range(POOL + 200)]
    assert newcomers[0] is None
    assert {cluster for cluster in newcomers[-50:] if cluster is not None} == set(
        range(before, len(made.sizes))
    )
    assert len(made.sizes) > before


def test_similar_groups_are_merged() -> None:
    """Copies of two prompts make two groups, although there is room for six."""
    unit_PD = np.repeat(np.array([features(range(20)), features(range(50, 90))]), 30, axis=0)
    group_P = groups(unit_PD, 6)
    assert len(np.unique(group_P)) == 2
    assert len(np.unique(group_P[:30])) == len(np.unique(group_P[30:])) == 1


def test_the_same_prompts_give_the_same_clusters() -> None:
    """If they arrive in the same order."""
    one, other = ClusterRouter(4), ClusterRouter(4)
    assert [one.assign(ids) for _, ids in stream(3, 900)] == [
        other.assign(ids) for _, ids in stream(3, 900)
    ]


@pytest.mark.parametrize("count", [0, 100, 700])
def test_a_restored_router_continues(count: int) -> None:
    """It assigns later prompts like the original, with clusters and before the first ones."""
    one = trained(count=count)
    other = ClusterRouter.from_bytes(one.to_bytes(), 4)
    assert other.sizes == one.sizes
    rest = [ids for _, ids in stream(3, 700, seed=2)]
    assert [other.assign(ids) for ids in rest] == [one.assign(ids) for ids in rest]


@pytest.mark.parametrize(
    "state", [b"", b"junk", b"PK\x03\x04", ClusterRouter(2).to_bytes()[:-40], damaged()]
)
def test_invalid_states_are_refused(state: bytes) -> None:
    """All with the same error."""
    with pytest.raises(ValueError, match="not the state of a router"):
        ClusterRouter.from_bytes(state, 2)


def test_a_state_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names its version."""
    state = ClusterRouter(2).to_bytes()
    monkeypatch.setattr(clustering, "FORMAT", 2)
    with pytest.raises(ValueError, match="version 1"):
        ClusterRouter.from_bytes(state, 2)


def test_without_learning_a_prompt_leaves_no_trace() -> None:
    """It gets a cluster, and the state does not change."""
    made = trained()
    before = made.to_bytes()
    assert made.assign(prompt(0, random.Random(3)), learn=False) is not None
    assert made.to_bytes() == before


def test_the_shortest_prompt_has_features() -> None:
    """It has one token and no pair of tokens."""
    assert np.linalg.norm(features([5])) == pytest.approx(1)
