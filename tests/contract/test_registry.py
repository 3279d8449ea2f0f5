"""The registry on SQLite and PostgreSQL: versions, activations, rollbacks and audit."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from online.database import connect, transaction
from online.errors import Conflict, InvalidRequest, NotFound, SlipstreamError, Unavailable
from online.registry import Registry
from online.tables import Version
from online.versions import Candidate, add_version


@pytest.fixture
def registry(database: Engine) -> Registry:
    made = Registry(database)
    made.ensure_routes(("default", "other"))
    return made


def candidate(sha256: str = "a" * 64) -> Candidate:
    return Candidate(
        sha256, {"divergence": "forward_kl"}, {"first": "1-0"}, {"gain": 0.1}, "c0ffee"
    )


def version(database: Engine, route: str = "default", sha256: str = "b" * 64) -> int:
    """A registered version that was never activated."""
    with transaction(database, writes=True) as session:
        return add_version(
            session, route, candidate(sha256), "test", parent_id=None, cycle_id=None
        ).id


def at_once(count: int, call: Callable[[int], object]) -> list[object]:
    """`call(i)` in `count` threads that start together. Errors are returned as results."""
    barrier = threading.Barrier(count)

    def one(i: int) -> object:
        barrier.wait()
        try:
            return call(i)
        except SlipstreamError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_the_first_draft_is_registered_once(registry: Registry) -> None:
    """Eight decoders that start together make one version and one activation."""
    found = at_once(8, lambda i: registry.register_first("default", candidate(), f"decoder-{i}"))
    assert {v.id for v in found} == {registry.versions("default")[0].id}  # type: ignore[attr-defined]
    assert [a.kind for a in registry.activations("default")] == ["initial"]


def test_activations_have_author_time_and_reason(registry: Registry, database: Engine) -> None:
    """The newest activation names the active version."""
    first = registry.register_first("default", candidate(), "decoder")
    second = version(database)
    made = registry.activate("default", second, "manual", "alice", "canary looked good")
    assert (made.number, made.from_version, made.to_version) == (2, first.id, second)
    assert (made.actor, made.reason, made.created_at.tzinfo is not None) == (
        "alice",
        "canary looked good",
        True,
    )
    assert registry.active("default").id == second  # type: ignore[union-attr]
    assert {r: v.id for r, v in registry.active_versions().items()} == {"default": second}
    audit = registry.audit()[0]
    assert (audit.actor, audit.action, audit.detail) == (
        "alice",
        "activate:manual",
        {"from_version": first.id, "to_version": second},
    )


def test_rollback_goes_back_to_the_first_version(registry: Registry, database: Engine) -> None:
    """A further rollback is a conflict."""
    first = registry.register_first("default", candidate(), "decoder")
    second = version(database)
    registry.activate("default", second, "promotion", "trainer", "better")
    back = registry.rollback("default", "rollback", "bob", "3 a.m.")
    assert (back.from_version, back.to_version, back.kind) == (second, first.id, "rollback")
    with pytest.raises(Conflict) as refused:
        registry.rollback("default", "rollback", "bob", "again")
    assert refused.value.code == "nothing_to_roll_back"


def test_an_automatic_rollback_yields_to_a_later_activation(
    registry: Registry, database: Engine
) -> None:
    """The guard found that version 2 is worse, but version 3 is active by now."""
    registry.register_first("default", candidate(), "decoder")
    second, third = version(database), version(database, sha256="c" * 64)
    registry.activate("default", second, "promotion", "trainer", "better")
    registry.activate("default", third, "manual", "alice", "no, this")
    with pytest.raises(Conflict, match="no longer active"):
        registry.rollback("default", "auto_rollback", "guard", "fell", expected=second)
    assert registry.active("default").id == third  # type: ignore[union-attr]


def test_racing_activations_make_one_line(registry: Registry, database: Engine) -> None:
    """Each successful activation follows the previous one. The others get a conflict."""
    registry.register_first("default", candidate(), "decoder")
    ids = [version(database, sha256=str(i) * 64) for i in range(6)]
    results = at_once(6, lambda i: registry.activate("default", ids[i], "manual", f"op{i}", "race"))
    assert all(isinstance(r, Conflict) or r.to_version in ids for r in results)  # type: ignore[attr-defined]
    line = list(reversed(registry.activations("default")))
    assert [a.number for a in line] == list(range(1, len(line) + 1))
    assert all(a.from_version == b.to_version for b, a in itertools.pairwise(line))


def test_versions_stay_on_their_route(registry: Registry, database: Engine) -> None:
    """A version can't be activated on another route. Unknown versions are named."""
    registry.register_first("default", candidate(), "decoder")
    foreign = version(database, route="other")
    with pytest.raises(Conflict, match="another route"):
        registry.activate("default", foreign, "manual", "alice", "oops")
    for unknown in (999, 0, -1, 2**40):
        with pytest.raises(NotFound):
            registry.activate("default", unknown, "manual", "alice", "oops")
    with pytest.raises(NotFound) as refused:
        registry.versions("nowhere")
    assert refused.value.param == "route"


def test_activating_the_active_version_is_refused(registry: Registry) -> None:
    """Nothing is written."""
    first = registry.register_first("default", candidate(), "decoder")
    with pytest.raises(Conflict) as refused:
        registry.activate("default", first.id, "manual", "alice", "again")
    assert refused.value.code == "already_active"


def test_freezing_is_audited(registry: Registry) -> None:
    """With author and reason."""
    assert registry.set_frozen("default", True, "alice", "release week").frozen
    assert registry.route("default").frozen
    assert not registry.set_frozen("default", False, "alice", "over").frozen
    assert [(a.action, a.reason) for a in registry.audit()] == [
        ("unfreeze", "over"),
        ("freeze", "release week"),
    ]


def test_text_that_a_database_cannot_store_is_an_invalid_request(
    registry: Registry, database: Engine
) -> None:
    """PostgreSQL refuses NUL. SQLite stores it."""
    registry.register_first("default", candidate(), "decoder")
    if database.dialect.name == "sqlite":
        registry.record("alice", "note", "default", "a\x00b")
    else:
        with pytest.raises(InvalidRequest, match="keep this value"):
            registry.record("alice", "note", "default", "a\x00b")


def test_an_unreachable_database_is_unavailable(tmp_path: object) -> None:
    """The driver's own error does not come through."""
    with pytest.raises(Unavailable):
        Registry(connect("postgresql+psycopg://nobody@127.0.0.1:1/none")).routes()
    with pytest.raises(Unavailable):
        Registry(connect(f"sqlite:///{tmp_path}/no/such/folder/x.db")).routes()


def test_a_version_has_what_was_registered(registry: Registry) -> None:
    """Recipe, window, gate report and commit are unchanged."""
    made = registry.register_first("default", candidate(), "decoder")
    found = registry.version(made.id)
    assert isinstance(found, Version)
    assert (found.recipe, found.window, found.gate, found.git_commit, found.parent_id) == (
        {"divergence": "forward_kl"},
        {"first": "1-0"},
        {"gain": 0.1},
        "c0ffee",
        None,
    )


def test_a_route_says_what_its_drafts_must_learn(registry: Registry) -> None:
    """The decoder writes it and the trainer reads it; a route that did not exist is created."""
    assert registry.route("default").teaching == {}
    registry.set_teaching({"default": {"masks": 3}, "new": {"exit_weight": 1}})
    assert registry.route("default").teaching == {"masks": 3}
    assert registry.route("new").teaching == {"exit_weight": 1}
    registry.set_teaching({"default": {}})
    assert registry.route("default").teaching == {}
    assert registry.route("new").teaching == {"exit_weight": 1}
