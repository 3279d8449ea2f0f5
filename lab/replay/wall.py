"""Tokens per second on held-out queries, in one engine and in interleaved rounds.

Compared are no speculation, the first draft and the live one, each at its own best γ, and the live
draft with other drafters at the engine's own γ.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lab.interleaved import Variant, fastest, interleave, mixed, round_size
from lab.replay.config import Replay
from lab.replay.service import FROZEN, LIVE, Service
from lab.replay.streams import StreamQuery

GAMMAS = (0, 1, 2, 3, 4, 6, 8)
PAIRS = (("live", "frozen"), ("live", "plain"), ("frozen", "plain"))


def compare_speeds(
    service: Service, queries: Sequence[StreamQuery], config: Replay
) -> dict[str, Any]:
    """By sequences in flight: tokens/s, γ, ratios [value, low, high] of pairs, and drafters."""
    alternating = mixed(queries)
    levels = sorted({1, config.at_once})
    return {str(n): _compare(service, alternating, config, n) for n in levels}


def _compare(
    service: Service, queries: Sequence[StreamQuery], config: Replay, at_once: int
) -> dict[str, Any]:
    count = min(round_size(config.wall_queries, at_once), len(queries))
    run = partial(_run, service)
    chains = {"plain": Variant(route=LIVE, gamma=0)}
    for name, route in (("frozen", FROZEN), ("live", LIVE)):
        tried = [Variant(route=route, gamma=gamma) for gamma in GAMMAS]
        best = fastest(tried, queries, count, at_once, run)
        chains[name] = Variant(route=route, gamma=best.gamma)
    others = {name: Variant(route=LIVE, drafter=name) for name in config.drafters}
    variants = [*chains.values(), *others.values()]
    interleave(variants, queries, count, at_once, config.wall_rounds, run)
    live, plain = chains["live"], chains["plain"]
    drafters = {"chain": live, **others}
    return {
        "gamma": {name: each.gamma for name, each in chains.items()},
        "tokens_per_s": {name: float(np.median(each.speeds)) for name, each in chains.items()},
        "ratios": {f"{a}_{b}": chains[a].speed_over(chains[b]).figures for a, b in PAIRS},
        "drafters": {name: each.figures(live, plain) for name, each in drafters.items()},
    }


def _run(service: Service, variant: Variant, queries: Sequence[StreamQuery], at_once: int) -> None:
    started = time.perf_counter()
    answers = service.answer(
        queries,
        route=variant.route,
        gamma=variant.gamma,
        drafter=variant.drafter,
        store=False,
        at_once=at_once,
    )
    variant.add(answers, time.perf_counter() - started)
