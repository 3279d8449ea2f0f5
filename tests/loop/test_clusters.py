"""A cluster's first draft: it descends from the generic draft and must beat it on the cluster."""

from pathlib import Path

import pytest

from online.leases import Lease
from online.tables import Cycle, Version
from online.versions import GENERIC, Candidate
from tests.conftest import copy_into
from tests.loop.conftest import Loop
from tests.signals import taught
from tests.tiny import TinyPair
from trainer.context import CycleContext
from trainer.cycle import run

CLUSTER = "default-c1"


@pytest.fixture
def clustered(sqlite_loop: Loop) -> Loop:
    """A default route with one cluster, as a decoder registers them; candidates become canaries."""
    sqlite_loop.settings = sqlite_loop.settings.model_copy(update={"canary_share": 0.2})
    sqlite_loop.registry.ensure_routes((CLUSTER,))
    generic = active(sqlite_loop, "default")
    stands_for = Candidate(generic.sha256, {"origin": GENERIC}, {}, {}, "test")
    sqlite_loop.registry.register_first(CLUSTER, stands_for, "decoder", generic.id)
    return sqlite_loop


def active(loop: Loop, route: str) -> Version:
    found = loop.registry.active(route)
    assert found is not None
    return found


def leased(loop: Loop) -> Lease:
    lease = loop.ledger.take(loop.ledger.request(CLUSTER, "test")[0].id, 60)
    assert lease is not None
    return lease


def learn(loop: Loop) -> Cycle:
    lease = leased(loop)
    run(CycleContext.of(loop.settings), lease)
    return loop.ledger.cycle(lease.cycle_id)


def newer_generic(loop: Loop, weights: Path) -> Version:
    digest = loop.artifacts.publish(lambda folder: copy_into(weights, folder))
    lease = loop.ledger.take(loop.ledger.request("default", "test")[0].id, 60)
    assert lease is not None
    made = Candidate(digest, {}, {}, {"reason": "better"}, "test")
    loop.ledger.conclude(lease, active(loop, "default"), made, True, {})
    return active(loop, "default")


def test_it_descends_from_the_generic_draft_that_is_active_now(
    clustered: Loop, pair: TinyPair
) -> None:
    """Not from the draft at the cluster's start. It is promoted at once, without a canary."""
    generic = newer_generic(clustered, pair.spoilt)
    clustered.feed(taught(pair.target, 150), CLUSTER)
    cycle = learn(clustered)
    assert cycle.state == "promoted"
    own = active(clustered, CLUSTER)
    assert (own.route, own.parent_id, own.cycle_id) == (CLUSTER, generic.id, cycle.id)
    assert active(clustered, "default").id == generic.id
    assert [each.kind for each in clustered.registry.activations(CLUSTER)] == [
        "promotion",
        "initial",
    ]


def test_it_has_to_beat_the_generic_draft(clustered: Loop, pair: TinyPair) -> None:
    """A generic draft that is as good as the target is not replaced."""
    newer_generic(clustered, pair.target)
    clustered.feed(taught(pair.target, 60), CLUSTER)
    assert learn(clustered).state == "rejected"
    serving = clustered.registry.serving(CLUSTER)
    assert serving is not None
    assert serving.id == active(clustered, "default").id


def test_it_waits_where_the_generic_draft_has_changed_meanwhile(
    clustered: Loop, pair: TinyPair
) -> None:
    """It was compared with one that nobody has any more."""
    compared = clustered.registry.serving(CLUSTER)
    assert compared is not None
    lease = leased(clustered)
    newer_generic(clustered, pair.draft)
    made = Candidate(compared.sha256, {}, {}, {"reason": "better"}, "test")
    cycle = clustered.ledger.conclude(lease, compared, made, True, {})
    assert (cycle.state, cycle.error) == ("held", f"the active version is no longer {compared.id}")


def test_rollback_goes_to_the_generic_draft_and_the_next_one_descends_from_it(
    clustered: Loop, pair: TinyPair
) -> None:
    """Whichever that is by then."""
    clustered.feed(taught(pair.target, 150), CLUSTER)
    assert learn(clustered).state == "promoted"
    clustered.registry.rollback(CLUSTER, "rollback", "test", "test")
    generic = newer_generic(clustered, pair.draft)
    serving = clustered.registry.serving(CLUSTER)
    assert serving is not None
    assert serving.id == generic.id
