"""A cluster's sequences use the generic draft until the cluster has a working draft of its own."""

from collections.abc import Iterator

import pytest

from decoder.rollout.live import LiveDraft
from tests.engines import Bench, bench, query, target_alone
from tests.tiny import TinyPair

PROMPT = (40, 50, 60)
GENERIC, OWN, CLUSTER = 5, 8, "default-c1"


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    """The default route at version 5 with a cluster that follows it."""
    with bench(pair, {"default": pair.draft, CLUSTER: pair.spoilt}) as made:
        draft(made, "default").version = GENERIC
        draft(made, CLUSTER).follow(draft(made, "default"))
        yield made


def draft(tiny: Bench, route: str) -> LiveDraft:
    return tiny.engine.batch.drafts[route]


def install_own(tiny: Bench, pair: TinyPair) -> None:
    staged = draft(tiny, CLUSTER).stage(pair.draft)
    tiny.engine.between_steps(lambda: draft(tiny, CLUSTER).install(staged, OWN))


def versions(tiny: Bench, pair: TinyPair, route: str) -> set[int]:
    (found,) = tiny.run(query(PROMPT, route=route))
    assert found.ids == target_alone(pair, PROMPT, 24)
    return {version for _, _, version in found.stats.versions}


def test_a_cluster_follows_the_generic_draft(tiny: Bench, pair: TinyPair) -> None:
    """Whichever version that has: nothing is copied, and the cluster's own weights lie still."""
    assert versions(tiny, pair, CLUSTER) == {GENERIC}
    draft(tiny, "default").version = GENERIC + 1
    assert versions(tiny, pair, CLUSTER) == {GENERIC + 1} == {draft(tiny, CLUSTER).serving}


def test_a_cluster_with_weights_of_its_own_uses_them(tiny: Bench, pair: TinyPair) -> None:
    """From the installation on, and for its own rows alone."""
    install_own(tiny, pair)
    assert versions(tiny, pair, CLUSTER) == {OWN}
    assert versions(tiny, pair, "default") == {GENERIC}
    assert draft(tiny, CLUSTER).serving == OWN


def test_a_cluster_whose_draft_failed_has_the_generic_one(tiny: Bench, pair: TinyPair) -> None:
    """Rather than none."""
    install_own(tiny, pair)
    assert versions(tiny, pair, CLUSTER) == {OWN}
    draft(tiny, CLUSTER).fail()
    assert versions(tiny, pair, CLUSTER) == {GENERIC}


def test_one_answer_and_two_drafts(tiny: Bench, pair: TinyPair) -> None:
    """Rows of a cluster and of its default route share steps, each with its draft."""
    install_own(tiny, pair)
    routes = ["default", CLUSTER] * 3
    found = tiny.run(*(query(PROMPT, f"q{i}", route=route) for i, route in enumerate(routes)))
    assert all(each.ids == target_alone(pair, PROMPT, 24) for each in found)
    assert [each.stats.versions[0][2] for each in found] == [GENERIC, OWN] * 3
