"""A replay along its stream: traffic, training, shifts of domain and what is forgotten."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lab.replay.config import Replay, spans
from lab.replay.log import Event, Log, Logs
from lab.statistics import Floats

RECOVERED = 0.9  # share of a domain's plateau at which a shift counts as recovered


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
