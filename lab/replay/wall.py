"""Tokens per second on held-out queries: no speculation, the first draft, the live one, each at its own best γ, and the
live one where the engine chooses what drafts.

All run in one engine and by turns. Before, short rounds find each draft's best γ, 0 included.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lab.replay.config import Replay
from lab.replay.service import FROZEN, LIVE, Service
from lab.replay.streams import Asked
from lab.rig import dealt
from lab.statistics import median_ratio
from online.messages import DrafterName

GAMMAS = (0, 1, 2, 3, 4, 6, 8)
# Over all γ, each with other queries: one alone took γ = 1 for a draft that was fastest without, and eight of the same
# short answers, again and again, no speculation where a draft kept half of its tokens.
ROUNDS = 3
ROUTES = {"plain": LIVE, "frozen": FROZEN, "live": LIVE, "chosen": LIVE}
PAIRS = (("live", "frozen"), ("live", "plain"), ("frozen", "plain"), ("chosen", "live"), ("chosen", "plain"))


def compare_speeds(service: Service, asked: Sequence[Asked], config: Replay) -> dict[str, Any]:
    """By sequences at once: tokens/s, the γ of each, and ratios [value, low, high] of every pair."""
    found = {}
    # Sampled and greedy ones alike in every turn.
    mixed = [one for pair in zip(asked[: len(asked) // 2], asked[len(asked) // 2 :], strict=True) for one in pair]
    for at_once in sorted({1, config.at_once}):
        share = max(1, config.wall_queries // 2)
        tried = [dealt(mixed, share, turn) for turn in range(ROUNDS)]
        best: dict[str, int | None] = {"plain": 0, "chosen": None}
        best |= {name: _best_gamma(service, ROUTES[name], tried, at_once) for name in ("frozen", "live")}
        speeds: dict[str, list[float]] = {name: [] for name in ROUTES}
        for turn in range(config.wall_turns):
            queries = dealt(mixed, config.wall_queries, turn)
            order = list(ROUTES) if turn % 2 else list(ROUTES)[::-1]
            for name in order:
                drafter: DrafterName = "auto" if name == "chosen" else "chain"
                speeds[name].append(_speed(service, ROUTES[name], queries, best[name], at_once, drafter))
        found[str(at_once)] = {
            "gamma": best,
            "tokens_per_s": {name: round(float(np.median(each)), 1) for name, each in speeds.items()},
            "ratios": {f"{a}_{b}": _ratio(speeds[a], speeds[b]) for a, b in PAIRS},
        }
    return found


def _best_gamma(service: Service, route: str, rounds: Sequence[Sequence[Asked]], at_once: int) -> int:
    speeds = dict.fromkeys(GAMMAS, 0.0)
    for asked in rounds:
        for gamma in GAMMAS:
            speeds[gamma] += _speed(service, route, asked, gamma, at_once)
    return max(speeds, key=lambda gamma: speeds[gamma])


def _speed(
    service: Service,
    route: str,
    asked: Sequence[Asked],
    gamma: int | None,
    at_once: int,
    drafter: DrafterName = "chain",
) -> float:
    started = time.perf_counter()
    answers = service.answer(asked, route=route, gamma=gamma, drafter=drafter, store=False, at_once=at_once)
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - started)


def _ratio(a: Sequence[float], b: Sequence[float]) -> list[float]:
    ratio = median_ratio(np.array(a) / np.array(b))
    return [round(ratio.value, 3), round(ratio.low, 3), round(ratio.high, 3)]
