"""The cycle ledger on SQLite and PostgreSQL: one cycle per route, leases, and used signals."""

import time
from datetime import timedelta

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from online.cycles import CycleLedger
from online.database import now
from online.leases import Lease, LeaseLost
from online.registry import Registry
from online.tables import Cycle, Version
from tests.contract.test_registry import at_once, candidate

LEASE_S = 0.2


@pytest.fixture
def registry(database: Engine) -> Registry:
    made = Registry(database)
    made.ensure_routes(("default", "other"))
    made.register_first("default", candidate(), "decoder")
    return made


@pytest.fixture
def ledger(database: Engine, registry: Registry) -> CycleLedger:
    return CycleLedger(database)


def leased(ledger: CycleLedger) -> Lease:
    cycle, _ = ledger.request("default", "test")
    lease = ledger.take(cycle.id, LEASE_S)
    assert lease is not None
    return lease


def active(registry: Registry) -> Version:
    found = registry.active("default")
    assert found is not None
    return found


def conclude(
    ledger: CycleLedger, registry: Registry, lease: Lease, promote: bool = True, sha: str = "b" * 64
) -> Cycle:
    made = candidate(sha)
    made.gate["reason"] = "better"
    return ledger.conclude(lease, active(registry), made, promote, {"train_s": 1})


def test_a_second_request_returns_the_unfinished_cycle(ledger: CycleLedger) -> None:
    """A route has one, also if eight callers ask at once."""
    found = at_once(8, lambda i: ledger.request("default", f"op{i}"))
    assert len({cycle.id for cycle, _ in found}) == 1  # type: ignore[attr-defined]
    assert sum(created for _, created in found) == 1  # type: ignore[attr-defined]
    assert ledger.request("other", "op")[1]


def test_one_of_several_workers_gets_a_cycle(ledger: CycleLedger) -> None:
    """Eight take the same cycle at once."""
    cycle, _ = ledger.request("default", "test")
    leases = [
        lease for lease in at_once(8, lambda i: ledger.take(cycle.id, 30)) if lease is not None
    ]
    assert leases == [Lease(cycle.id, 1)]


def test_a_silent_worker_is_replaced_and_can_no_longer_write(
    ledger: CycleLedger, registry: Registry
) -> None:
    """After its lease has expired, every call with the old fence is refused."""
    old = leased(ledger)
    assert ledger.take(old.cycle_id, LEASE_S) is None
    time.sleep(2 * LEASE_S)
    new = ledger.take(old.cycle_id, LEASE_S)
    assert new == Lease(old.cycle_id, 2)
    for write in (
        lambda: ledger.heartbeat(old),
        lambda: ledger.set_window(old, "1-0", "2-0"),
        lambda: ledger.finish(old, "empty", {}),
        lambda: ledger.release(old, "x"),
        lambda: conclude(ledger, registry, old),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert len(registry.versions("default")) == 1
    assert conclude(ledger, registry, new).state == "promoted"


def test_a_heartbeat_keeps_the_lease(ledger: CycleLedger) -> None:
    """As long as it continues."""
    lease = leased(ledger)
    for _ in range(4):
        time.sleep(LEASE_S / 2)
        ledger.heartbeat(lease)
    assert ledger.take(lease.cycle_id, LEASE_S) is None


def test_concluding_registers_and_promotes_in_one_step(
    ledger: CycleLedger, registry: Registry
) -> None:
    """The version has its parent and cycle. The trainer is the author of the activation."""
    parent, lease = active(registry), leased(ledger)
    cycle = conclude(ledger, registry, lease)
    version = active(registry)
    assert (cycle.state, cycle.report["version"]) == ("promoted", version.id)
    assert (version.parent_id, version.cycle_id) == (parent.id, lease.cycle_id)
    newest = registry.activations("default")[0]
    assert (newest.kind, newest.actor, newest.from_version) == ("promotion", "trainer", parent.id)
    with pytest.raises(LeaseLost):
        conclude(ledger, registry, lease)


def test_a_refused_candidate_is_kept_and_not_activated(
    ledger: CycleLedger, registry: Registry
) -> None:
    """It stays registered with its report."""
    before = active(registry).id
    assert conclude(ledger, registry, leased(ledger), promote=False).state == "rejected"
    assert active(registry).id == before
    assert len(registry.versions("default")) == 2


def test_digests_of_old_refused_candidates(ledger: CycleLedger, registry: Registry) -> None:
    """Without versions that were promoted or activated, and without weights that those share."""
    for promote, sha in ((False, "c"), (True, "d"), (False, "d"), (False, "e")):
        conclude(ledger, registry, leased(ledger), promote=promote, sha=sha * 64)
    assert registry.refused(now()) == {"c" * 64, "e" * 64}
    assert registry.refused(now() - timedelta(hours=1)) == set()
    chosen = next(version for version in registry.versions("default") if version.sha256[0] == "e")
    registry.activate("default", chosen.id, "manual", "me", "looked at it")
    assert registry.refused(now()) == {"c" * 64}


def test_a_frozen_route_holds_its_candidate(ledger: CycleLedger, registry: Registry) -> None:
    """It is registered but not activated, and the cycle has the reason."""
    registry.set_frozen("default", True, "alice", "release week")
    cycle = conclude(ledger, registry, leased(ledger))
    assert (cycle.state, cycle.error) == ("held", "the route is frozen")


def test_a_candidate_compared_with_another_version_is_held(
    ledger: CycleLedger, registry: Registry
) -> None:
    """An operator activated another version meanwhile: the gate report does not apply to it."""
    parent, lease = active(registry), leased(ledger)
    other = registry.version(conclude(ledger, registry, lease).report["version"])
    lease = leased(ledger)
    made = candidate("c" * 64)
    made.gate["reason"] = "better"
    cycle = ledger.conclude(lease, parent, made, True, {})
    assert (cycle.state, active(registry).id) == ("held", other.id)


def test_two_cycles_never_use_the_same_signals(ledger: CycleLedger, registry: Registry) -> None:
    """The ledger has a watermark, and the table enforces it."""
    lease = leased(ledger)
    ledger.set_window(lease, "9-0", "10-0")
    assert ledger.watermark("default") is None
    conclude(ledger, registry, lease)
    again = leased(ledger)
    with pytest.raises(IntegrityError):
        ledger.set_window(again, "9-0", "10-0")
    ledger.set_window(again, "10-1", "11-0")
    ledger.finish(again, "empty", {})
    assert ledger.watermark("default") == "11-0"
    assert ledger.watermark("other") is None


def test_a_cycle_fails_after_its_attempts(ledger: CycleLedger) -> None:
    """Its window counts as used, so that a window that always fails is not tried for ever."""
    lease = leased(ledger)
    ledger.set_window(lease, "1-0", "5-0")
    ledger.release(lease, "killed after 1800 s")
    assert not ledger.give_up(lease.cycle_id, LEASE_S, 2)
    second = ledger.take(lease.cycle_id, LEASE_S)
    assert second is not None
    ledger.release(second, "out of memory")
    assert ledger.give_up(lease.cycle_id, LEASE_S, 2)
    assert not ledger.give_up(lease.cycle_id, LEASE_S, 2)
    failed = ledger.cycle(lease.cycle_id)
    assert (failed.state, failed.error) == (
        "failed",
        "given up after 2 attempts; the last one: out of memory",
    )
    assert ledger.watermark("default") == "5-0"
    with pytest.raises(LeaseLost):
        ledger.heartbeat(second)
    assert ledger.request("default", "next")[1]


def test_the_last_attempt_may_finish(ledger: CycleLedger) -> None:
    """Redis may deliver its task again meanwhile. A silent worker ends the cycle."""
    lease = leased(ledger)
    assert not ledger.give_up(lease.cycle_id, LEASE_S, 1)
    ledger.heartbeat(lease)
    time.sleep(2 * LEASE_S)
    assert ledger.give_up(lease.cycle_id, LEASE_S, 1)
    assert ledger.cycle(lease.cycle_id).error.endswith("ended unseen")


def test_counts_are_by_route_and_state(ledger: CycleLedger, registry: Registry) -> None:
    """The metrics show them."""
    conclude(ledger, registry, leased(ledger))
    ledger.request("default", "next")
    assert ledger.counts() == {("default", "promoted"): 1, ("default", "queued"): 1}
