"""Segments of a replay, and the figures that its logs give."""

import math
import random
from pathlib import Path

import pytest

from lab.replay.config import Domain, Replay, Segment, spans
from lab.replay.figures import forgetting, recoveries, summarise
from lab.replay.log import Log, locked
from lab.replay.presets import preset, segments

DOMAINS = {name: Domain(traffic="x", held_out="y") for name in ("a", "b")}


def replay(*order: str) -> Replay:
    return Replay(
        domains=DOMAINS, segments=[Segment(queries=100, mix={name: 1.0}) for name in order]
    )


def log(path: Path, **swaps: dict[int, float]) -> Log:
    """By domain, its expected τ after the swap at so many queries; at 0 the first draft's."""
    path.mkdir(exist_ok=True)
    found = Log(path / "log.jsonl")
    times = sorted({at for curve in swaps.values() for at in curve})
    standing: dict[str, float] = {}
    for at in times:
        standing |= {name: curve[at] for name, curve in swaps.items() if at in curve}
        found.add(
            "swap" if at else "first",
            at,
            domains={name: {"tau": tau} for name, tau in standing.items()},
        )
    return found


@pytest.mark.parametrize(
    ("curve", "queries"),
    [
        ({0: 1.0, 150: 1.5, 180: 2.0, 200: 2.05}, 80.0),  # 90 % of what it ends with
        ({0: 1.0, 150: 1.05}, 0.0),  # it had that before
        ({0: 1.0}, 0.0),  # nothing to be won
    ],
)
def test_a_domain_has_recovered_at_nine_tenths_of_its_plateau(
    tmp_path: Path, curve: dict[int, float], queries: float
) -> None:
    """Queries are counted from the start of its segment."""
    assert recoveries(replay("a", "b"), "b", log(tmp_path, a={0: 1.0}, b=curve)) == [queries]


def test_a_later_swap_is_not_a_recovery(tmp_path: Path) -> None:
    """A segment without a swap does not recover to the plateau of the domain's later segment."""
    swaps = log(tmp_path, a={0: 1.0, 250: 2.0}, b={0: 1.0})
    assert recoveries(replay("a", "b", "a"), "a", swaps) == [math.inf, 50.0]


def test_a_domain_that_fades_in_has_no_shift(tmp_path: Path) -> None:
    """Forgetting counts from the end of its fading out."""
    config = Replay(
        domains=DOMAINS | {"c": DOMAINS["a"]}, segments=segments("gradual", ["a", "b", "c"], 100)
    )
    swaps = log(
        tmp_path,
        a={0: 1.0, 40: 2.0, 120: 1.5, 260: 1.2},
        b={0: 1.0, 140: 2.0},
        c={0: 1.0, 240: 2.0},
    )
    assert [(part.domains, part.end) for part in spans(config)] == [
        (("a",), 50), (("a", "b"), 150), (("b", "c"), 250), (("c",), 300),
    ]  # fmt: skip
    assert [recoveries(config, name, swaps) for name in "abc"] == [[40.0], [], []]
    assert [list(forgetting(config, name, swaps)) for name in "abc"] == [
        [pytest.approx(0.2)],
        [0.0],
        [],
    ]


def test_a_query_s_answers_are_one_observation(tmp_path: Path) -> None:
    """More seeds with the same answers do not make an interval narrower."""
    rng, logs = random.Random(0), {}
    held_out = {
        at: [[rng.randint(20, 60), rng.randint(10, 20), 5.0, 10] for _ in range(20)]
        for at in (0, 100)
    }
    config = Replay(
        domains={"a": DOMAINS["a"]}, segments=[Segment(queries=100, mix={"a": 1})], held_out=20
    )
    found = []
    for seed in (1, 2, 3):
        logs[seed] = log(tmp_path / str(seed), a={0: 1.0})
        for at, rows in held_out.items():
            logs[seed].add("held_out", at, domain="a", rows=rows + rows)
        found.append(summarise(config, logs)["a"])
    assert all(one["tau_ratio_low"] == pytest.approx(found[0]["tau_ratio_low"]) for one in found)


def test_a_line_cut_short_is_dropped_and_written_again(tmp_path: Path) -> None:
    """The events after it are complete."""
    path = tmp_path / "log.jsonl"
    Log(path).add("cycle", 1)
    path.write_text(path.read_text() + '{"kind": "serv')
    Log(path).add("swap", 2)
    assert [event["kind"] for event in Log(path).events] == ["cycle", "swap"]


def test_two_replays_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second gets an error and writes nothing."""
    with (
        locked(tmp_path),
        pytest.raises(ValueError, match="another replay is at work"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_presets_are_made_of_whole_segments(tmp_path: Path) -> None:
    """Abrupt, fading, mixed, and coming back: the same number of queries of every domain."""
    names = ["a", "b", "c"]
    assert [part.main for part in segments("abrupt", names, 10)] == names
    gradual = segments("gradual", names, 10)
    assert [(part.fade, part.queries) for part in gradual] == [
        (False, 5),
        (True, 10),
        (True, 10),
        (False, 5),
    ]
    assert [part.main for part in segments("recurring", names[:2], 10)] == ["a", "b", "a", "b"]
    (mixture,) = segments("mixture", names, 10)
    assert (mixture.queries, mixture.main) == (30, "")
    config = preset("recurring", tmp_path, 10)
    assert [(part.domains, part.end) for part in spans(config)] == [
        (("math",), 10), (("sql",), 20), (("math",), 30), (("sql",), 40),
    ]  # fmt: skip


def test_a_fade_goes_from_one_mix_to_the_next() -> None:
    """The weights change linearly over the segment."""
    before, after = (
        Segment(queries=5, mix={"a": 2.0}),
        Segment(queries=10, mix={"b": 1.0}, fade=True),
    )
    assert after.weights(0, before) == {"a": 1.0, "b": 0.0}
    assert after.weights(5, before) == {"a": 0.5, "b": 0.5}
    assert Replay(domains={"a": Domain(traffic="x", held_out="y")}, segments=[before]).queries == 5
