"""Canaries on SQLite and PostgreSQL: one per route, ended once, by whoever comes first."""

import itertools

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError

from online.canaries import CanaryLedger, open_canary
from online.cycles import CycleLedger
from online.database import transaction
from online.errors import Conflict, NotFound
from online.registry import Registry
from online.tables import Canary, Cycle
from tests.contract.test_cycles import active, leased
from tests.contract.test_registry import at_once, candidate, version


@pytest.fixture
def registry(database: Engine) -> Registry:
    made = Registry(database)
    made.ensure_routes(("default", "other"))
    made.register_first("default", candidate(), "decoder")
    return made


@pytest.fixture
def ledger(database: Engine, registry: Registry) -> CycleLedger:
    return CycleLedger(database)


@pytest.fixture
def canaries(database: Engine) -> CanaryLedger:
    return CanaryLedger(database)


def conclude(ledger: CycleLedger, registry: Registry, share: float = 0.2) -> Cycle:
    made = candidate("b" * 64)
    made.gate["reason"] = "better"
    return ledger.conclude(leased(ledger), active(registry), made, True, {}, share)


@pytest.fixture
def canary(ledger: CycleLedger, registry: Registry, canaries: CanaryLedger) -> Canary:
    """Version 2 beside version 1."""
    conclude(ledger, registry)
    return canaries.require("default")


def test_a_candidate_becomes_a_canary_first(
    ledger: CycleLedger,
    registry: Registry,
    canaries: CanaryLedger,
) -> None:
    """Its cycle ends, the active version stays, and the audit has the start and its reason."""
    cycle = conclude(ledger, registry)
    canary = canaries.running()["default"]
    assert (cycle.state, cycle.report["version"], active(registry).id) == (
        "canary",
        canary.version,
        1,
    )
    assert (canary.beside_version, canary.share, canary.state, canary.finished_at) == (
        1,
        0.2,
        "running",
        None,
    )
    begun = registry.audit()[0]
    assert (begun.actor, begun.action, begun.reason) == ("trainer", "canary:start", "better")
    with pytest.raises(NotFound):
        canaries.require("other")


def test_no_cycle_starts_while_a_canary_runs(
    ledger: CycleLedger, canary: Canary, canaries: CanaryLedger
) -> None:
    """Its candidate could not be promoted over the canary. Cycles start again afterwards."""
    with pytest.raises(Conflict) as refused:
        ledger.request("default", "op")
    assert refused.value.code == "canary_running"
    assert ledger.request("other", "op")[1]
    canaries.finish(canary, "aborted", "canary", "worse")
    assert ledger.request("default", "op")[1]


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_candidate_is_held_while_a_canary_runs(
    ledger: CycleLedger, registry: Registry, canaries: CanaryLedger, database: Engine, share: float
) -> None:
    """Also if the canary started while the cycle was running."""
    lease, other = leased(ledger), version(database)
    with transaction(database, writes=True) as session:
        open_canary(session, "default", other, 1, 0.1, "test", "test")
    made = candidate("e" * 64)
    made.gate["reason"] = "better"
    cycle = ledger.conclude(lease, active(registry), made, True, {}, share)
    assert (cycle.state, cycle.error) == ("held", f"version {other} is a canary on this route")
    assert canaries.require("default").version == other


def test_promotion_is_an_activation_with_the_reason(
    registry: Registry,
    canary: Canary,
    canaries: CanaryLedger,
) -> None:
    """One transaction ends the canary and activates its version. Both are audited."""
    canaries.finish(canary, "promoted", "canary", "difference +0.05")
    newest = registry.activations("default")[0]
    assert (newest.kind, newest.actor, newest.reason) == ("promotion", "canary", "difference +0.05")
    assert (newest.from_version, newest.to_version) == (1, canary.version)
    ended = canaries.canaries("default")[0]
    assert (ended.state, ended.actor, ended.reason) == ("promoted", "canary", "difference +0.05")
    assert ended.finished_at is not None
    assert canaries.running() == {}
    assert {a.action for a in registry.audit(2)} == {"canary:promoted", "activate:promotion"}
    assert canaries.counts() == {("default", "promoted"): 1}


def test_an_aborted_canary_changes_nothing_else(
    registry: Registry, canary: Canary, canaries: CanaryLedger
) -> None:
    """The version stays registered with its gate report, and the active version stays active."""
    canaries.finish(canary, "aborted", "canary", "difference −0.2")
    assert active(registry).id == 1
    assert registry.version(canary.version).gate["reason"] == "better"
    assert canaries.canaries()[0].state == "aborted"


def test_the_first_of_several_decisions_counts(
    registry: Registry, canary: Canary, canaries: CanaryLedger
) -> None:
    """Several decoders test on their own: one writes, the others get a conflict."""
    outcomes = ("promoted", "aborted") * 4
    results = at_once(8, lambda i: canaries.finish(canary, outcomes[i], f"decoder-{i}", "sure"))
    (winner,) = [i for i, result in enumerate(results) if not isinstance(result, Conflict)]
    won = outcomes[winner]
    assert canaries.canaries()[0].state == won
    assert active(registry).id == (canary.version if won == "promoted" else 1)


@pytest.mark.parametrize("change", ["activate", "rollback"])
def test_any_other_activation_supersedes_a_canary(
    registry: Registry,
    database: Engine,
    ledger: CycleLedger,
    canaries: CanaryLedger,
    change: str,
) -> None:
    """The version beside it is no longer active. A later decision gets a conflict."""
    second = version(database, sha256="c" * 64)
    registry.activate("default", second, "manual", "alice", "first")
    conclude(ledger, registry)
    canary = canaries.require("default")
    assert canary.beside_version == second
    if change == "activate":
        registry.activate("default", 1, "manual", "alice", "back")
    else:
        registry.rollback("default", "rollback", "alice", "back")
    ended = canaries.canaries()[0]
    assert (ended.state, ended.actor, ended.reason) == (
        "superseded",
        "alice",
        "version 1 was activated: back",
    )
    assert "canary:superseded" in {a.action for a in registry.audit(3)}
    with pytest.raises(Conflict):
        canaries.finish(canary, "promoted", "canary", "late")
    assert active(registry).id == 1


def test_a_canary_on_a_frozen_route_is_held(
    registry: Registry, canary: Canary, canaries: CanaryLedger
) -> None:
    """No automatic decision is carried out. An operator may still decide."""
    registry.set_frozen("default", True, "alice", "release week")
    for outcome in ("promoted", "aborted"):
        with pytest.raises(Conflict) as refused:
            canaries.finish(canary, outcome, "canary", "sure")  # type: ignore[arg-type]
        assert refused.value.code == "route_frozen"
    canaries.finish(canary, "promoted", "alice", "I know better", even_frozen=True)
    assert active(registry).id == canary.version


def test_a_route_has_one_canary(database: Engine, canary: Canary) -> None:
    """The table itself refuses a second running canary."""
    with pytest.raises(IntegrityError), transaction(database, writes=True) as session:
        open_canary(session, "default", canary.version, 1, 0.1, "test", "second")


def test_racing_changes_make_one_line_of_activations(
    registry: Registry,
    database: Engine,
    canary: Canary,
    canaries: CanaryLedger,
) -> None:
    """Whichever comes first: the canary ends once, and each activation follows the previous one."""
    other = version(database, sha256="d" * 64)
    calls = (
        lambda: registry.activate("default", other, "manual", "alice", "at once"),
        lambda: canaries.finish(canary, "promoted", "canary", "at once"),
    )
    at_once(2, lambda i: calls[i]())
    line = list(reversed(registry.activations("default")))
    assert all(a.from_version == b.to_version for b, a in itertools.pairwise(line))
    assert canaries.canaries()[0].state == (
        "promoted" if canary.version in {a.to_version for a in line} else "superseded"
    )
    assert active(registry).id == other
