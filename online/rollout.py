"""Which version may draft: the test of a canary, and the guard over a newly active version.

Both compare live acceptance with the confidence sequence of `online.sequential`. A request counts
if one version alone drafted for it; its acceptance rate is the mean of Σ min(p, q).

This is bookkeeping without I/O. The decoder calls it and writes the outcome, so that neither the
trainer nor Redis is needed.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from online.sequential import Arm, Difference, difference

RECENT_REQUESTS = 500  # requests that represent a version's live acceptance
LATEST_REQUESTS = 50  # the last of them: traffic since the shift that the successor was made for
WATCHED_REQUESTS = 100  # first requests of a version, which the guard compares


# ── canaries ──


@dataclass(frozen=True, slots=True)
class Rules:
    """When a comparison decides."""

    min_requests: int  # requests of each version before acceptance decides anything
    max_requests: int  # requests of each version after which a decision is due
    margin: float  # acceptance that a candidate may lose: it has passed the gate already


@dataclass(frozen=True, slots=True)
class Decision:
    outcome: Literal["promoted", "aborted"]
    reason: str


class CanaryTest:
    """Acceptance of a canary and of the active version beside it, over the same time."""

    def __init__(self, version: int, beside: int, rules: Rules) -> None:
        self.version = version
        self.beside = beside
        self.canary = Arm()
        self.active = Arm()
        self._rules = rules
        self._requests = {version: 0, beside: 0}  # includes requests that compared no position

    def observe(self, version: int, acceptance_rate: float | None) -> None:
        """Counts one finished request. `acceptance_rate`: None if nothing was compared."""
        if version not in self._requests:
            return
        self._requests[version] += 1
        if acceptance_rate is not None:
            (self.canary if version == self.version else self.active).add(acceptance_rate)

    def decision(self) -> Decision | None:
        """The outcome, if there is one yet.

        With confidence: promoted if the loss is below the margin, aborted if there is a loss.
        After `max_requests` without either, the means decide. If the versions could not be
        compared, because plain steps are faster here than any draft, the gate's report decides.
        """
        seen = self._difference()
        margin = self._rules.margin
        if seen is not None and seen.low > -margin:
            return Decision("promoted", f"{self._figures(seen)}: above −{margin:g}")
        if seen is not None and seen.high < 0:
            return Decision("aborted", f"{self._figures(seen)}: below 0")
        requests = min(self._requests.values())
        if requests < self._rules.max_requests:
            return None
        if seen is None:
            reason = f"{requests} requests and too few comparisons: on the gate's report alone"
            return Decision("promoted", reason)
        reason = f"{self._figures(seen)}: undecided after {requests} requests, by the mean"
        return Decision("promoted" if seen.mean >= -margin else "aborted", reason)

    def _difference(self) -> Difference | None:
        compared = min(self.canary.requests, self.active.requests)
        if compared < self._rules.min_requests:
            return None
        return difference(self.canary, self.active)

    def _figures(self, seen: Difference) -> str:
        canary, active = self.canary, self.active
        return (
            f"acceptance {canary.mean:.3f} over {canary.requests} requests, "
            f"version {self.beside}'s {active.mean:.3f} over {active.requests}, difference {seen}"
        )


# ── the guard ──


@dataclass(frozen=True, slots=True)
class Regression:
    """A finding of the guard: `version` accepts less than `baseline_version` did."""

    route: str
    version: int
    baseline_version: int
    live: Arm
    baseline: Arm

    @property
    def reason(self) -> str:
        return (
            f"live acceptance {self.live.mean:.3f} over {self.live.requests} requests "
            f"is below version {self.baseline_version}'s {self.baseline.mean:.3f}: "
            f"difference {difference(self.live, self.baseline)}"
        )


@dataclass
class _Watch:
    """The running version of a route and the baselines of its predecessor."""

    version: int
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_REQUESTS))
    seen: Arm = field(default_factory=Arm)
    baseline_version: int = 0
    baselines: tuple[Arm, ...] = ()  # over all recent requests, and over the latest ones

    def as_baselines(self) -> tuple[Arm, ...]:
        return arm(self.recent), arm(list(self.recent)[-LATEST_REQUESTS:])


class RolloutGuard:
    """Compares each route's running version with its predecessor. Not thread-safe.

    The two served one after the other, so a shift of the traffic looks like a bad version, and
    versions are often made because of a shift. A version counts as worse only if it accepts less
    than its predecessor did over its recent requests, and less than over its latest ones.

    A bad version shows within some twenty requests. So the guard watches the first
    `WATCHED_REQUESTS`; a later fall is due to the traffic.
    """

    def __init__(self, min_requests: int) -> None:
        self._min_requests = min_requests
        self._watches: dict[str, _Watch] = {}

    def started(self, route: str, version: int, *, watched: bool) -> None:
        """`version` begins to serve the route.

        `watched`: compare it with its predecessor. A version that came by rollback is not
        watched: the guard would return to the same one.
        """
        before = self._watches.get(route)
        watch = self._watches[route] = _Watch(version)
        if before is None or not watched:
            return
        if len(before.recent) >= self._min_requests:
            watch.baselines = before.as_baselines()
            watch.baseline_version = before.version
        else:  # The predecessor served too few requests: its own baselines stay.
            watch.baselines = before.baselines
            watch.baseline_version = before.baseline_version

    def observe(self, route: str, version: int, acceptance_rate: float) -> Regression | None:
        """Counts one finished request. Returns a regression once, when it becomes certain."""
        watch = self._watches.get(route)
        if watch is None or watch.version != version:
            return None
        watch.recent.append(acceptance_rate)
        watch.seen.add(acceptance_rate)
        if not self._min_requests <= watch.seen.requests <= WATCHED_REQUESTS:
            return None
        if not watch.baselines:
            return None
        nearest = max(watch.baselines, key=lambda baseline: difference(watch.seen, baseline).high)
        if difference(watch.seen, nearest).high >= 0:
            return None
        watch.baselines = ()  # Reported once.
        return Regression(route, version, watch.baseline_version, watch.seen, nearest)

    def live(self, route: str) -> float | None:
        """Mean acceptance rate of the running version's recent requests."""
        watch = self._watches.get(route)
        return arm(watch.recent).mean if watch and watch.recent else None


def arm(rates: Iterable[float]) -> Arm:
    """An arm of these acceptance rates."""
    made = Arm()
    for rate in rates:
        made.add(rate)
    return made
