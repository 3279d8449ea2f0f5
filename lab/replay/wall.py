"""Tokens per second on held-out queries, in one engine and in interleaved rounds.

Compared are no speculation, the first draft and the live one, each at its own best γ.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from lab.interleaved import Variant, at_best_gamma, interleave, mixed, round_size
from lab.replay.config import Replay
from lab.replay.service import FROZEN, LIVE, Service
from lab.replay.streams import StreamQuery

GAMMAS = (0, 1, 2, 3, 4, 6, 8)


def compare_speeds(
    service: Service, queries: Sequence[StreamQuery], config: Replay
) -> dict[str, Any]:
    """By sequences in flight: γ, and ratios [value, low, high] of tokens per second."""
    alternating = mixed(queries)
    levels = sorted({1, config.at_once})
    return {str(n): _compare(service, alternating, config, n) for n in levels}


def _compare(
    service: Service, queries: Sequence[StreamQuery], config: Replay, at_once: int
) -> dict[str, Any]:
    count = min(round_size(config.wall_queries, at_once), len(queries))
    run = partial(_run, service)
    variants = {"plain": Variant(route=LIVE, gamma=0)}
    for name, route in (("frozen", FROZEN), ("live", LIVE)):
        variants[name] = at_best_gamma(GAMMAS, queries, count, at_once, run, route=route)
    interleave(list(variants.values()), queries, count, at_once, config.wall_rounds, run)
    live = variants["live"]
    others = ("frozen", "plain")
    return {
        "gamma": {name: each.gamma for name, each in variants.items()},
        "live_over": {name: live.speed_over(variants[name]).figures for name in others},
    }


def _run(service: Service, variant: Variant, queries: Sequence[StreamQuery], at_once: int) -> None:
    started = time.perf_counter()
    route, gamma = variant.route, variant.gamma
    answers = service.answer(queries, route=route, gamma=gamma, store=False, at_once=at_once)
    variant.add(answers, time.perf_counter() - started)
