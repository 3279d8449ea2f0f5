"""The figures of a replay: by domain, over seeds and arms."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lab.replay.config import Replay, spans
from lab.replay.log import Event, Log, Logs
from lab.statistics import Floats, paired_ratio

RECOVERED = 0.9  # share of a domain's plateau at which a shift counts as recovered
WALLS = {"frozen": "wall_ratio", "plain": "wall_over_plain"}  # the live draft is compared with


def figures(config: Replay, arms: Mapping[str, Logs]) -> dict[str, Any]:
    """All figures; `domains` are the first arm's."""
    first, *others = arms
    cycles = [event for log in arms[first].values() for event in log.of("cycle")]
    return {
        "domains": summarise(config, arms[first]),
        "seeds": len(config.seeds),
        "arms": {name: summarise(config, arms[name]) for name in others},
        "over": {name: _over(config, arms[first], arms[name]) for name in others},
        "cycles": len(cycles),
        "train_s": sum(event["train_s"] for event in cycles),
        "swaps": sum(event["state"] == "promoted" for event in cycles),
    }


def summarise(config: Replay, logs: Logs) -> dict[str, Any]:
    """By domain, over all seeds, at the end of the domain's last segment."""
    found: dict[str, Any] = {}
    for domain in config.domains:
        ends = [span.end for span in spans(config) if domain in span.domains]
        if ends:
            found[domain] = {
                **_gain(config, domain, ends[-1], logs),
                **_speeds(domain, ends[-1], logs),
                **_shifts(config, domain, logs),
            }
    return found


def _gain(config: Replay, domain: str, end: int, logs: Logs) -> dict[str, Any]:
    """τ and acceptance on held-out queries before and after, and the paired ratio of τ."""
    found: dict[str, Any] = {}
    before, after = (_held_out(logs, domain, at, config.held_out) for at in (0, end))
    for name, side in (("", slice(None)), ("sampled_", 0), ("greedy_", 1)):
        old, new = _by_query(before[side]), _by_query(after[side])
        ratio = paired_ratio(old[:2], new[:2])
        found |= {
            f"{name}tau_before": old[0].sum() / old[1].sum(),
            f"{name}tau_after": new[0].sum() / new[1].sum(),
            f"{name}tau_ratio": ratio.value,
            f"{name}tau_ratio_low": ratio.low,
            f"{name}tau_ratio_high": ratio.high,
            f"{name}acceptance_before": old[2].sum() / old[3].sum(),
            f"{name}acceptance_after": new[2].sum() / new[3].sum(),
        }
    return found


def _speeds(domain: str, end: int, logs: Logs) -> dict[str, Any]:
    """Ratios of tokens per second, medians over seeds.

    Keys of several sequences in flight end in their number.
    """
    found: dict[str, Any] = {}
    walls = [event for log in logs.values() for event in log.of("wall", domain=domain, at=end)]
    for at_once in [key for key in walls[0] if key.isdigit()] if walls else ():
        suffix = "" if at_once == "1" else f"_{at_once}"
        own = [wall[at_once] for wall in walls]
        for other, name in WALLS.items():
            ratios = [wall["live_over"][other] for wall in own]
            value, low, high = np.median(ratios, axis=0).tolist()
            found[f"{name}{suffix}"] = value
            found |= {f"{name}{suffix}_low": low, f"{name}{suffix}_high": high}
        found[f"gamma{suffix}"] = own[0]["gamma"]
    return found


def _shifts(config: Replay, domain: str, logs: Logs) -> dict[str, Any]:
    """Medians over seeds of how fast the domain recovers, and of what is forgotten of it."""
    visits = list(zip(*(recoveries(config, domain, log) for log in logs.values()), strict=True))
    medians = [_median(visit) for visit in visits]
    lost = [share for log in logs.values() for share in forgetting(config, domain, log)]
    return {
        "queries_to_recover": medians[0] if medians else None,
        "queries_to_recover_again": medians[1:],
        "seeds_not_recovered": sum(map(math.isinf, visits[0])) if visits else 0,
        "forgetting": _median(lost),
    }


def _over(config: Replay, first: Logs, other: Logs) -> dict[str, list[float]]:
    """τ of `other` divided by τ of `first`, by domain, on held-out queries."""
    found = {}
    for span in spans(config):
        for name in span.domains:
            sides = (_held_out(logs, name, span.end, config.held_out) for logs in (first, other))
            old, new = (_by_query(side)[:2] for side in sides)
            found[name] = paired_ratio(old, new).figures
    return found


def _held_out(logs: Logs, domain: str, at: int, held_out: int) -> Floats:
    """[sampled and greedy, seeds, queries, (tokens, forwards, Σ overlap, compared)]."""
    rows = [log.of("held_out", domain=domain, at=at)[0]["rows"] for log in logs.values()]
    return np.array(rows, float).reshape(len(logs), 2, held_out, 4).swapaxes(0, 1)


def _by_query(rows: Floats) -> Floats:
    """[(tokens, forwards, Σ overlap, compared), queries].

    The answers to one query, over seeds and kinds, are one observation.
    """
    found: Floats = rows.reshape(-1, *rows.shape[-2:]).sum(0).T
    return found


def _median(found: Sequence[float]) -> float | None:
    """None where there are none, or where it is infinite."""
    middle = float(np.median(found)) if found else math.inf
    return middle if math.isfinite(middle) else None


def live(logs: Logs, what: str) -> tuple[list[int], Floats]:
    """(queries, values by seed [S, chunks]) of `frozen_tau`, `live_acceptance`, … of traffic."""
    served: Sequence[list[Event]] = [log.of("served") for log in logs.values()]
    shortest = min(map(len, served))
    values = [[np.mean(event[what]) for event in events[:shortest]] for events in served]
    return [event["at"] for event in served[0][:shortest]], np.array(values)


def recoveries(config: Replay, domain: str, log: Log) -> list[float]:
    """Queries after each shift to the domain until its expected τ has 90 % of its plateau.

    The plateau is the best by the end of the domain's last segment. Infinite: it never recovers.
    """
    parts = spans(config)
    shifts = [
        span
        for before, span in zip([None, *parts], parts, strict=False)
        if span.domains == (domain,) and not (before and domain in before.domains)
    ]
    found = []
    for span in shifts:
        curve = _curve(log, domain, shifts[-1].end)
        enough = RECOVERED * max(tau for _, tau in curve)
        at_start = [tau for at, tau in curve if at <= span.start][-1]
        reached = (at for at, tau in curve if span.start < at <= span.end and tau >= enough)
        found.append(0.0 if at_start >= enough else next(reached, math.inf) - span.start)
    return found


def forgetting(config: Replay, domain: str, log: Log) -> Iterator[float]:
    """Largest share of a domain's expected τ lost while only other domains are served after it."""
    parts = spans(config)
    for i, span in enumerate(parts[:-1]):
        if domain not in span.domains or domain in parts[i + 1].domains:
            continue
        returns = (later.start for later in parts[i + 1 :] if domain in later.domains)
        curve = _curve(log, domain, next(returns, parts[-1].end))
        at_end = _curve(log, domain, span.end)[-1][1]
        lowest = min((tau for at, tau in curve if at > span.end), default=at_end)
        yield 1 - lowest / at_end


def _curve(log: Log, domain: str, upto: int) -> list[tuple[int, float]]:
    """(queries, expected τ on held-out queries) of the first draft and after every swap."""
    events = [*log.of("first"), *(event for event in log.of("swap") if event["at"] <= upto)]
    return [(event["at"], event["domains"][domain]["tau"]) for event in events]
