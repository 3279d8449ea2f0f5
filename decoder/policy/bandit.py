"""Chooses the drafter of each step: a bandit, rewarded by tokens per second.

The fastest drafter depends on the traffic, on the draft's version and on
the load of the machine. That is hard to model and easy to measure
(BanditSpec, arXiv 2505.15141).

A route is served in rounds of a few steps, because switching has a cost: a
draft must catch up on tokens that another drafter produced. Each round uses
the drafter with the highest upper confidence bound. Every drafter also
keeps a small share of the time, because traffic and drafts change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from decoder.policy.drafter_speed import (
    ROUND_STEPS,
    Estimate,
    Records,
    SpeedRecord,
    Workload,
    estimate_speeds,
)

MIN_TIME_SHARE = 0.02  # of a route's time, divided equally between all drafters


@dataclass
class Round:
    """Some steps of a route: a trial of one drafter, or the fastest by workload."""

    trial: str = ""  # a drafter, or none
    fastest: dict[Workload, str] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0


@dataclass
class _Route:
    seconds: dict[str, float]  # that each drafter has had
    records: Records = field(default_factory=dict)
    current: Round = field(default_factory=lambda: Round(steps=ROUND_STEPS))


@dataclass
class DrafterBandit:
    """Call `choose` before a step, `observe` after it. Routes learn separately."""

    drafters: Sequence[str]
    _routes: dict[str, _Route] = field(default_factory=dict)
    _chosen: tuple[Workload, str] | None = None

    def choose(self, workload: Workload) -> str:
        """The drafter of the next step."""
        route = self._route(workload)
        if route.current.steps >= ROUND_STEPS:
            route.current = self._next_round(route, workload)
        current = route.current
        if not current.trial and workload not in current.fastest:
            estimates = estimate_speeds(route.records, workload)
            current.fastest[workload] = _fastest(estimates)
        drafter = current.trial or current.fastest[workload]
        self._chosen = workload, drafter
        return drafter

    def observe(self, tokens: int, seconds: float, catch_up_s: float = 0.0) -> None:
        """Learns from the step after `choose`; does nothing without a choice.

        `catch_up_s` are the seconds in which drafts encoded the context
        they lacked. They count against a drafter in regular use. In a trial
        they do not, because other drafters caused them.
        """
        if self._chosen is None:
            return
        workload, drafter = self._chosen
        self._chosen = None
        route = self._routes[workload.route]
        route.current.steps += 1
        route.current.seconds += seconds
        route.seconds[drafter] += seconds
        if not route.current.trial:
            seconds += catch_up_s
        route.records[workload][drafter].add_step(tokens, seconds)

    def estimates(self, workload: Workload) -> dict[str, Estimate]:
        """By drafter, for a workload that was chosen for before."""
        return estimate_speeds(self._routes[workload.route].records, workload)

    def _route(self, workload: Workload) -> _Route:
        if workload.route not in self._routes:
            self._routes[workload.route] = _Route(dict.fromkeys(self.drafters, 0.0))
        route = self._routes[workload.route]
        if workload not in route.records:
            route.records[workload] = {name: SpeedRecord() for name in self.drafters}
        return route

    def _next_round(self, route: _Route, workload: Workload) -> Round:
        neglected = min(self.drafters, key=lambda name: route.seconds[name])
        min_share = MIN_TIME_SHARE / len(self.drafters)
        after_trial = route.seconds[neglected] + route.current.seconds
        if after_trial < min_share * sum(route.seconds.values()):
            return Round(neglected)
        estimates = estimate_speeds(route.records, workload)
        bounds = {name: one.upper_bound(workload.spread) for name, one in estimates.items()}
        chosen = max(bounds, key=bounds.__getitem__)
        if estimates[chosen].rounds > 0 and chosen == _fastest(estimates):
            return Round(fastest={workload: chosen})
        return Round(chosen)


def _fastest(estimates: dict[str, Estimate]) -> str:
    return max(estimates, key=lambda name: estimates[name].log_speed)
