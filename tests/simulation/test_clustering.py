"""Clusters of prompts, learnt as they come."""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from online import clustering as router
from online.clustering import ClusterRouter, features, groups

TEMPLATE_START, TEMPLATE_END = list(range(10)), list(range(10, 20))


def prompt(kind: int, rng: random.Random, tokens: int = 15) -> list[int]:
    """A template around words of the kind's own and words that every kind has."""
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
    """A state with a byte of its arrays turned over."""
    state = bytearray(trained(count=50).to_bytes())
    state[len(state) // 2] ^= 0xFF
    return bytes(state)


def trained(most: int = 4, kinds: int = 2, count: int = 700) -> ClusterRouter:
    made = ClusterRouter(most)
    for _, ids in stream(kinds, count):
        made.assign(ids)
    return made


def purity(made: ClusterRouter, kinds: int) -> float:
    """Share of new prompts that are of the kind that most of their cluster's are of."""
    found: dict[int | None, Counter[int]] = {}
    for kind, ids in stream(kinds, 300, seed=1):
        found.setdefault(made.assign(ids), Counter())[kind] += 1
    found.pop(None, None)
    return sum(each.most_common(1)[0][1] for each in found.values()) / 300


def test_two_kinds_of_prompts_are_told_apart() -> None:
    """Although half of every prompt is its template."""
    made = trained(most=2)
    assert len(made.sizes) == 2
    assert purity(made, 2) > 0.95


def test_the_first_prompts_belong_to_no_cluster() -> None:
    """One prompt says too little: clusters begin when enough have come."""
    made = ClusterRouter(2)
    assert {made.assign(ids) for _, ids in stream(2, router.POOL)} == {None}
    assert sum(made.sizes) == router.POOL


def test_what_every_prompt_has_does_not_make_prompts_alike() -> None:
    """A template of 200 tokens around eight words changes nothing."""
    made, rng, found = ClusterRouter(2), random.Random(0), []
    for i in range(router.POOL + 200):
        words = prompt(i % 2, rng, tokens=8)[10:-10]
        found.append(made.assign([*range(1000, 1100), *words, *range(1100, 1200)]))
    late = [
        {cluster for cluster in found[router.POOL + kind :: 2] if cluster is not None}
        for kind in (0, 1)
    ]
    assert all(len(each) == 1 for each in late)
    assert late[0] != late[1]


def test_there_are_never_more_clusters_than_allowed() -> None:
    """Eight kinds and room for three."""
    made = trained(most=3, kinds=8, count=3000)
    assert len(made.sizes) <= 3
    assert len(made._strangers) < router.POOL


def test_a_new_kind_becomes_a_cluster_while_there_is_room() -> None:
    """Unlike any cluster, its prompts are strangers at first; enough of them get one of their own."""
    made = trained(most=4, kinds=1)
    before, rng = len(made.sizes), random.Random(5)
    assert before < 4
    newcomers = [made.assign(prompt(7, rng)) for _ in range(router.POOL + 200)]
    assert newcomers[0] is None
    assert {cluster for cluster in newcomers[-50:] if cluster is not None} == set(
        range(before, len(made.sizes))
    )
    assert len(made.sizes) > before


def test_what_is_alike_is_one_cluster() -> None:
    """Room for more does not split copies of two prompts in more than two."""
    unit_PD = np.repeat(np.array([features(range(20)), features(range(50, 90))]), 30, axis=0)
    group_P = groups(unit_PD, 6)
    assert len(np.unique(group_P)) == 2
    assert len(np.unique(group_P[:30])) == len(np.unique(group_P[30:])) == 1


def test_the_same_prompts_give_the_same_clusters() -> None:
    """In the same order."""
    one, other = ClusterRouter(4), ClusterRouter(4)
    assert [one.assign(ids) for _, ids in stream(3, 900)] == [
        other.assign(ids) for _, ids in stream(3, 900)
    ]


@pytest.mark.parametrize("count", [0, 100, 700])
def test_a_router_goes_on_where_it_was_kept(count: int) -> None:
    """Before its first clusters, and with them: what it says of later prompts is what it would have said."""
    one = trained(count=count)
    other = ClusterRouter.from_bytes(one.to_bytes(), 4)
    assert other.sizes == one.sizes
    rest = [ids for _, ids in stream(3, 700, seed=2)]
    assert [other.assign(ids) for ids in rest] == [one.assign(ids) for ids in rest]


@pytest.mark.parametrize(
    "state", [b"", b"junk", b"PK\x03\x04", ClusterRouter(2).to_bytes()[:-40], damaged()]
)
def test_what_is_no_state_is_refused(state: bytes) -> None:
    """Whatever it is, by the same error."""
    with pytest.raises(ValueError, match="not the state of a router"):
        ClusterRouter.from_bytes(state, 2)


def test_a_state_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not guessed at."""
    state = ClusterRouter(2).to_bytes()
    monkeypatch.setattr(router, "FORMAT", 2)
    with pytest.raises(ValueError, match="version 1"):
        ClusterRouter.from_bytes(state, 2)


def test_a_prompt_that_must_leave_nothing_leaves_nothing() -> None:
    """It is assigned, and the state is the same as before."""
    made = trained()
    before = made.to_bytes()
    assert made.assign(prompt(0, random.Random(3)), learn=False) is not None
    assert made.to_bytes() == before


def test_the_shortest_prompt_has_features() -> None:
    """One token, and no pair."""
    assert np.linalg.norm(features([5])) == pytest.approx(1)
