"""From the logs of a replay to its figures."""

import math
from pathlib import Path

import pytest

from lab.replay.config import Domain, Replay, Segment
from lab.replay.figures import cost, recoveries
from lab.replay.run import Log

DOMAINS = {name: Domain(traffic="x", held_out="y") for name in ("a", "b")}


def replay(*order: str) -> Replay:
    return Replay(domains=DOMAINS, segments=[Segment(queries=100, mix={name: 1.0}) for name in order])


def log(path: Path, **swaps: dict[int, float]) -> Log:
    """By domain, its expected τ after the swap at so many queries; at 0 the first draft's."""
    found = Log(path / "log.jsonl")
    times = sorted({at for curve in swaps.values() for at in curve})
    standing: dict[str, float] = {}
    for at in times:
        standing |= {name: curve[at] for name, curve in swaps.items() if at in curve}
        found.add("swap" if at else "first", at, domains={name: {"tau": tau} for name, tau in standing.items()})
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
    """Counted from where its segment began."""
    logs = {1: log(tmp_path, a={0: 1.0}, b=curve)}
    assert list(recoveries(replay("a", "b"), "b", logs)) == [queries]


def test_what_comes_too_late_is_no_recovery(tmp_path: Path) -> None:
    """A segment that saw no swap has not recovered to what a later one of the domain reaches."""
    logs = {1: log(tmp_path, a={0: 1.0, 250: 2.0}, b={0: 1.0})}
    assert list(recoveries(replay("a", "b", "a"), "a", logs)) == [math.inf, 50.0]


def test_cost_is_told_along_the_stream(tmp_path: Path) -> None:
    """By tenths, over the seeds."""
    logs = {seed: Log(tmp_path / f"{seed}.jsonl") for seed in (1, 2)}
    logs[1].add("cycle", 20, train_s=4.0)
    logs[2].add("cycle", 21, train_s=8.0)
    logs[2].add("cycle", 200, train_s=2.0)
    assert cost(replay("a", "b"), logs) == [2.0, 4.0, 0, 0, 0, 0, 0, 0, 0, 1.0]
