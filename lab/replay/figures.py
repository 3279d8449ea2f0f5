"""From the logs of a replay to its figures: per domain what was gained, per shift how fast, and what was forgotten."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lab.replay.config import Replay, stretches
from lab.replay.run import Event, Log
from lab.statistics import Floats, paired_ratio

RECOVERED = 0.9  # share of a domain's plateau at which a shift counts as recovered
WALLS = {
    "live_frozen": "wall_ratio",
    "live_plain": "wall_over_plain",
    "frozen_plain": "frozen_over_plain",
}
Logs = Mapping[int, Log]  # by seed


def summarise(config: Replay, logs: Logs) -> dict[str, Any]:
    """By domain, over all seeds."""
    found: dict[str, Any] = {}
    for domain in config.domains:
        last = [part for part in stretches(config) if domain in part.domains]
        if last:
            found[domain] = _domain(config, domain, last[-1].end, logs)
    return found


def _domain(config: Replay, domain: str, end: int, logs: Logs) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    before, after = (_exam(logs, domain, at, config.held_out) for at in (0, end))
    for name, side in (("", slice(None)), ("sampled_", 0), ("greedy_", 1)):
        old, new = _by_query(before[side]), _by_query(after[side])
        ratio = paired_ratio((old[0], old[1]), (new[0], new[1]))
        figures |= {
            f"{name}tau_before": old[0].sum() / old[1].sum(),
            f"{name}tau_after": new[0].sum() / new[1].sum(),
            f"{name}tau_ratio": ratio.value,
            f"{name}tau_ratio_low": ratio.low,
            f"{name}tau_ratio_high": ratio.high,
            f"{name}acceptance_before": old[2].sum() / old[3].sum(),
            f"{name}acceptance_after": new[2].sum() / new[3].sum(),
        }
    figures["tau_ratio_by_seed"] = [
        compared({seed: log}, {seed: log}, domain, end, config.held_out, 0)[0]
        for seed, log in logs.items()
    ]
    walls = [event for log in logs.values() for event in log.of("wall", domain=domain, at=end)]
    for at_once in [key for key in walls[0] if key.isdigit()] if walls else ():
        suffix = "" if at_once == "1" else f"_{at_once}"
        for pair, name in WALLS.items():
            each = np.array([wall[at_once]["ratios"][pair] for wall in walls])
            figures[f"{name}{suffix}"], figures[f"{name}{suffix}_low"] = np.median(
                each[:, :2], axis=0
            ).tolist()
        told = [
            wall[at_once].get("drafters", {}) for wall in walls
        ]  # others have been timed with other seeds, or none
        figures[f"drafters{suffix}"] = {
            name: {
                key: np.median([one[name][key] for one in told], axis=0).tolist()
                for key in told[0][name]
            }
            for name in told[0]
            if all(name in one for one in told)
        }
        figures[f"gamma{suffix}"] = walls[0][at_once]["gamma"]
        figures[f"tokens_per_s{suffix}"] = {
            name: float(np.median([wall[at_once]["tokens_per_s"][name] for wall in walls]))
            for name in walls[0][at_once]["tokens_per_s"]
        }
    by_visit = list(zip(*(recoveries(config, domain, log) for log in logs.values()), strict=True))
    medians = [_median(visit) for visit in by_visit]
    figures["queries_to_recover"] = medians[0] if medians else None
    figures["queries_to_recover_again"] = medians[1:]
    figures["seeds_not_recovered"] = (
        sum(math.isinf(queries) for queries in by_visit[0]) if by_visit else 0
    )
    figures["forgetting"] = _median(
        [share for log in logs.values() for share in _forgetting(config, domain, log)]
    )
    return figures


def _exam(logs: Logs, domain: str, at: int, held_out: int) -> Floats:
    """[sampled and greedy, seeds × queries, (tokens, forwards, Σ overlap, compared)]."""
    rows = np.array(
        [log.of("exam", domain=domain, at=at)[0]["rows"] for log in logs.values()], float
    )
    return rows.reshape(len(logs), 2, held_out, 4).swapaxes(0, 1)


def _by_query(rows: Floats) -> Floats:
    """[(tokens, forwards, Σ overlap, compared), queries]: kinds and seeds of one query are no queries of their own."""
    found: Floats = rows.reshape(-1, *rows.shape[-2:]).sum(0).T
    return found


def _curve(log: Log, domain: str, upto: int) -> list[tuple[int, float]]:
    """(queries, expected τ on held-out queries) after every swap, from the first draft's on."""
    first = log.of("first")[0]["domains"][domain]["tau"]
    return [
        (0, first),
        *((e["at"], e["domains"][domain]["tau"]) for e in log.of("swap") if e["at"] <= upto),
    ]


def recoveries(config: Replay, domain: str, log: Log) -> list[float]:
    """Queries after each shift to the domain until its expected τ has 90 % of its plateau; infinite if never.

    The plateau is the best that is reached by the end of the domain's last segment.
    """
    parts = stretches(config)
    shifts = [
        part
        for before, part in zip([None, *parts], parts, strict=False)
        if part.domains == (domain,) and not (before and domain in before.domains)
    ]
    found = []
    for part in shifts:
        curve = _curve(log, domain, shifts[-1].end)
        enough = RECOVERED * max(tau for _, tau in curve)
        standing = [tau for at, tau in curve if at <= part.start][-1]
        reached = (at for at, tau in curve if part.start < at <= part.end and tau >= enough)
        found.append(0.0 if standing >= enough else next(reached, math.inf) - part.start)
    return found


def _forgetting(config: Replay, domain: str, log: Log) -> Iterator[float]:
    """Share of a domain's expected τ that is lost, at most, while only other domains are learnt after it."""
    parts = stretches(config)
    for i, part in enumerate(parts[:-1]):
        if domain not in part.domains or domain in parts[i + 1].domains:
            continue
        following = next(
            (later.start for later in parts[i + 1 :] if domain in later.domains), parts[-1].end
        )
        held = _curve(log, domain, part.end)[-1][1]
        later = [tau for at, tau in _curve(log, domain, following) if at > part.end]
        yield 1 - min(later, default=held) / held


def _median(found: Sequence[float]) -> float | None:
    """None where there are none, or where it is infinite."""
    middle = float(np.median(found)) if found else math.inf
    return middle if math.isfinite(middle) else None


def live(logs: Logs, what: str) -> tuple[list[int], Floats, Floats]:
    """(queries, mean over seeds, per seed [S, chunks]) of `frozen_tau`, `live_acceptance`, … along the stream."""
    served: Sequence[list[Event]] = [log.of("served") for log in logs.values()]
    shortest = min(map(len, served))
    values = np.array([[np.mean(event[what]) for event in events[:shortest]] for events in served])
    return [event["at"] for event in served[0][:shortest]], values.mean(0), values


def cost(config: Replay, logs: Logs) -> list[float]:
    """Seconds of training in each tenth of the stream, mean over seeds: what rests costs nothing."""
    found = np.zeros(10)
    for log in logs.values():
        for event in log.of("cycle"):
            found[min(9, 10 * (event["at"] - 1) // config.queries)] += event["train_s"] / len(logs)
    return [round(float(seconds), 1) for seconds in found]


def compared(
    theirs: Logs, ours: Logs, domain: str, at: int, held_out: int, theirs_at: int | None = None
) -> list[float]:
    """τ of arm `ours` ÷ arm `theirs` on a domain's held-out queries after so many of the stream, [value, low, high]."""
    old, new = (
        _by_query(_exam(side, domain, when, held_out))
        for side, when in ((theirs, at if theirs_at is None else theirs_at), (ours, at))
    )
    ratio = paired_ratio((old[0], old[1]), (new[0], new[1]))
    return [ratio.value, ratio.low, ratio.high]
