"""Tokens per second on held-out queries: no speculation, the first draft, the live one, each at its own best γ, and the
live one with other drafters, each as the engine would have it.

All run in one engine and by turns. Before, short rounds find each draft's best γ, 0 included.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.replay.config import Replay
from lab.replay.service import FROZEN, LIVE, Service
from lab.replay.streams import Asked
from lab.rig import dealt
from lab.turns import Turns, in_turn
from online.messages import DrafterName

GAMMAS = (0, 1, 2, 3, 4, 6, 8)
# Over all γ, each with other queries: one alone took γ = 1 for a draft that was fastest without, and eight of the same
# short answers, again and again, no speculation where a draft kept half of its tokens.
ROUNDS = 3
PAIRS = (("live", "frozen"), ("live", "plain"), ("frozen", "plain"))


@dataclass(kw_only=True)
class Contestant(Turns):
    route: str
    gamma: int | None  # None: the engine's choice, before every step
    drafter: DrafterName = "chain"

    def turn(self, service: Service, asked: Sequence[Asked], at_once: int) -> None:
        started = time.perf_counter()
        answers = service.answer(
            asked,
            route=self.route,
            gamma=self.gamma,
            drafter=self.drafter,
            store=False,
            at_once=at_once,
        )
        self.add(answers, time.perf_counter() - started)


def compare_speeds(service: Service, asked: Sequence[Asked], config: Replay) -> dict[str, Any]:
    """By sequences at once: tokens/s, the γ of each, ratios [value, low, high] of every pair, and what drafters do."""
    found = {}
    # Sampled and greedy ones alike in every turn.
    mixed = [
        one
        for pair in zip(asked[: len(asked) // 2], asked[len(asked) // 2 :], strict=True)
        for one in pair
    ]
    for at_once in sorted({1, config.at_once}):
        count = min(in_turn(config.wall_queries, at_once), len(mixed))
        tried = [dealt(mixed, max(1, count // 2), turn) for turn in range(ROUNDS)]
        usual = {"plain": Contestant(route=LIVE, gamma=0)} | {
            name: Contestant(route=route, gamma=_best_gamma(service, route, tried, at_once))
            for name, route in (("frozen", FROZEN), ("live", LIVE))
        }
        others = {
            name: Contestant(route=LIVE, gamma=None, drafter=name) for name in config.drafters
        }
        everyone = [*usual.values(), *others.values()]
        for turn in range(config.wall_turns):
            queries = dealt(mixed, count, turn)
            for one in everyone if turn % 2 else everyone[::-1]:
                one.turn(service, queries, at_once)
        found[str(at_once)] = {
            "gamma": {name: one.gamma for name, one in usual.items()},
            "tokens_per_s": {
                name: round(float(np.median(one.speeds)), 1) for name, one in usual.items()
            },
            "ratios": {f"{a}_{b}": usual[a].over(usual[b]) for a, b in PAIRS},
            "drafters": {
                name: one.told(usual["live"], usual["plain"])
                for name, one in {"chain": usual["live"], **others}.items()
            },
        }
    return found


def _best_gamma(
    service: Service, route: str, rounds: Sequence[Sequence[Asked]], at_once: int
) -> int:
    tried = {gamma: Contestant(route=route, gamma=gamma) for gamma in GAMMAS}
    for asked in rounds:
        for one in tried.values():
            one.turn(service, asked, at_once)
    return max(tried, key=lambda gamma: sum(tried[gamma].speeds))
