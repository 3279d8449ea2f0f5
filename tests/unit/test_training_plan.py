"""The training plan: examples, the held-out set, and clients' shares."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from online.buffer import Entry
from online.signals import Signal
from tests.signals import signal
from trainer.examples import held_out
from trainer.gate import MIN_REQUESTS
from trainer.training_plan import (
    HeldOutSet,
    PlanLimits,
    limit_client_share,
    make_plan,
    replay_order,
)

BOUNDS = PlanLimits(
    replayed_signals=400, held_out_requests=200, client_share=0.5, min_client_signals=0
)


def requests(count: int, name: str = "r", client: str = "", **more: object) -> list[Signal]:
    return [signal(f"{name}{i}", client=client, **more) for i in range(count)]


def ids(signals: Sequence[Signal]) -> list[str]:
    return [s.request_id for s in signals]


def clients(signals: Sequence[Signal]) -> Counter[str]:
    return Counter(s.client for s in signals)


def both(held_out_set: HeldOutSet) -> list[Signal]:
    return [*held_out_set.new, *held_out_set.earlier]


def test_held_out_requests_are_not_trained_on_and_no_request_is_lost() -> None:
    """New and older held-out requests are the strata; all others are examples."""
    window, older = requests(200, "w"), requests(300, "o")
    found = make_plan(window, older, BOUNDS)
    assert sorted(ids(found.passes[0] + both(found.held_out))) == sorted(ids(window + older))
    assert [held_out(s) for s in found.passes[0]] == [False] * len(found.passes[0])
    assert ids(found.held_out.new) == ids([s for s in reversed(window) if held_out(s)])
    assert ids(found.held_out.earlier) == ids([s for s in older if held_out(s)])
    assert found.left_out == {"lessons": 0, "exam": 0}


def test_the_same_signals_make_the_same_plan() -> None:
    """A cycle that was killed is repeated, not varied."""
    sides = requests(90, "w", "a") + requests(20, "v", "b"), requests(50, "o")
    assert repr(make_plan(*sides, BOUNDS)) == repr(make_plan(*sides, BOUNDS))


def test_bounds_keep_the_newest() -> None:
    """Of the replay and of each stratum."""
    window, older = requests(400, "w"), requests(400, "o")
    found = make_plan(
        window,
        older,
        PlanLimits(
            replayed_signals=10, held_out_requests=12, client_share=0.5, min_client_signals=0
        ),
    )
    assert ids(found.held_out.new) == ids([s for s in reversed(window) if held_out(s)][:12])
    assert ids(found.held_out.earlier) == ids([s for s in older if held_out(s)][:12])
    assert [i for i in ids(found.passes[0]) if i[0] == "o"] == ids(
        [s for s in older if not held_out(s)][:10]
    )


def test_a_window_of_few_held_out_requests_borrows_older_ones() -> None:
    """Up to the minimum, each of them once."""
    window, older = requests(12, "w"), requests(100, "o")
    own = [s for s in reversed(window) if held_out(s)]
    assert 0 < len(own) < MIN_REQUESTS
    held_out_set = make_plan(window, older, BOUNDS).held_out
    assert ids(held_out_set.new) == ids([*own, *(s for s in older if held_out(s))])[:MIN_REQUESTS]
    assert len(set(ids(both(held_out_set)))) == len(both(held_out_set))


def test_requests_since_the_active_draft_are_new() -> None:
    """Held-out requests of refused cycles count for the next candidate; passes stay the same."""
    window, older = requests(50, "w"), [*requests(100, "r"), *requests(100, "o")]
    recent = {s.request_id for s in older if s.request_id[0] == "r"}
    plain, found = make_plan(window, older, BOUNDS), make_plan(window, older, BOUNDS, recent)
    assert found.passes == plain.passes
    assert ids(found.held_out.new) == ids(
        [*(s for s in reversed(window) if held_out(s)), *(s for s in older[:100] if held_out(s))]
    )
    assert ids(found.held_out.earlier) == ids([s for s in older if held_out(s)]), (
        "nor may they be forgotten"
    )


def test_a_flood_has_no_more_than_its_share() -> None:
    """In the examples and both strata; it loses its oldest signals, which are counted."""
    window = requests(500, "flood", "f") + requests(100, "base", "b")
    older = requests(300, "oldflood", "f") + requests(60, "oldbase")
    found = make_plan(window, older, BOUNDS)
    for side in (found.passes[0], found.held_out.new, found.held_out.earlier):
        assert 0 < clients(side)["f"] <= len(side) / 2
        assert clients(side)["b"] + clients(side)[""] >= len(side) / 2
    held = [s for s in reversed(window) if held_out(s)]
    kept = [s for s in found.held_out.new if s.client == "f"]
    assert ids(kept) == ids([s for s in held if s.client == "f"][: len(kept)])
    assert found.left_out["exam"] == len(held) - len(found.held_out.new)
    assert found.left_out["lessons"] > 300


def test_a_single_client_has_no_bound() -> None:
    """A route of one application still gets examples."""
    found = make_plan(requests(50, "w", "a"), requests(50, "o", "a"), BOUNDS)
    assert len(found.passes[0]) + len(both(found.held_out)) == 100


def test_requests_without_a_client_are_not_limited() -> None:
    """Each counts as a client of its own."""
    signals = requests(90) + requests(10, "x", "x")
    assert limit_client_share(signals, 0.1) == (signals, 0)


def test_signals_of_an_older_target_are_not_used() -> None:
    """They describe another model."""
    window = requests(20, "w", model="old") + requests(20, "v", model="new")
    found = make_plan(window, requests(20, "o", model="old"), BOUNDS)
    assert {s.model for s in found.passes[0] + both(found.held_out)} == {"new"}


def test_concurrent_targets_are_all_used() -> None:
    """One draft serves both: it trains and is compared on both, without a replaced target."""
    window = requests(40, "x", model="old") + [
        s for i in range(40) for s in requests(1, f"{i}-", model="ab"[i % 2])
    ]
    older = (
        requests(20, "a", model="a") + requests(20, "b", model="b") + requests(20, "o", model="old")
    )
    found = make_plan(window, older, BOUNDS)
    assert (
        {s.model for s in found.passes[0]} == {s.model for s in both(found.held_out)} == {"a", "b"}
    )
    assert len(found.passes[0] + both(found.held_out)) == 80


def test_no_signals_make_an_empty_plan() -> None:
    """This is not an error."""
    found = make_plan([], [], BOUNDS)
    assert (found.passes, both(found.held_out)) == ([], [])


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    nobodys=st.integers(0, 10),
    share=st.floats(0.05, 1),
    limit=st.integers(2, 60),
)
def test_no_client_exceeds_its_share_in_any_mixture(
    counts: list[int], nobodys: int, share: float, limit: int
) -> None:
    """Whatever the mixture; one signal of every client, or of as many as fit, is always allowed."""
    signals = [
        s for i, count in enumerate(counts) for s in requests(count, f"c{i}-", f"c{i}")
    ] + requests(nobodys)
    kept, beyond = limit_client_share(signals, share, limit=limit)
    bound = max(share, 1 / min(limit, len(counts) + nobodys)) * len(kept)
    assert max((n for client, n in clients(kept).items() if client), default=0) <= bound + 1e-9
    assert len(kept) + beyond + max(0, len(signals) - beyond - limit) == len(signals)
    assert ids(kept) == [i for i in ids(signals) if i in set(ids(kept))]


def test_a_rare_client_does_not_limit_the_others() -> None:
    """Beside a client of two requests, another keeps the minimum, not two."""
    asked = requests(100, "a", "often") + requests(2, "b", "rarely")
    assert clients(limit_client_share(asked, 0.5, 48)[0]) == {"often": 48, "rarely": 2}
    assert clients(limit_client_share(asked, 0.5)[0]) == {"often": 2, "rarely": 2}


def test_every_window_replays_in_an_order_of_its_own() -> None:
    """The same window gives the same order, without its own entries."""
    kept = [Entry(f"{at}-0", b"") for at in range(1000)]
    orders = set()
    for at in range(0, 1000, 100):
        window, inside = kept[at : at + 50], set(kept[at : at + 50])
        found = replay_order(kept, window)
        assert found == replay_order(kept[::-1], window)
        assert sorted(e.id for e in found) == sorted(e.id for e in kept if e not in inside)
        orders.add(tuple(e.id for e in found[:50]))
    assert len(orders) == 10


@given(st.integers(0, 60), st.integers(0, 20))
def test_passes_replay_all_older_signals(count: int, size: int) -> None:
    """Every pass has the window and equally many older signals; together they have all of them."""
    window, older = requests(8, "w"), requests(count, "o")
    bounds = PlanLimits(
        replayed_signals=size, held_out_requests=200, client_share=1, min_client_signals=0
    )
    trained = [s.request_id for s in older if not held_out(s)]
    replayed = [
        [i for i in ids(examples) if i[0] == "o"]
        for examples in make_plan(window, older, bounds).passes
    ]
    assert {len(part) for part in replayed} == {min(size, len(trained))}
    assert all(len(set(part)) == len(part) for part in replayed)
    if size:
        assert {name for part in replayed for name in part} == set(trained)
