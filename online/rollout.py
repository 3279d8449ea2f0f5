"""The guard: a version whose live acceptance falls below its predecessor's interval is rolled back.

Pure bookkeeping. Who calls it and writes the rollback is the decoder, so it needs neither trainer nor Redis.
"""

import math
from collections import deque
from dataclasses import dataclass, field

KEPT_REQUESTS = 500  # recent requests that stand for a version's live acceptance
Z = 3.0  # half-width of an interval in standard errors: the guard looks after every request, so 1.96 would be too eager


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    low: float
    high: float
    requests: int


@dataclass(frozen=True, slots=True)
class Regression:
    """What the guard found: `version` accepts less than `baseline_version` did."""

    route: str
    version: int
    baseline_version: int
    live: Interval
    baseline: Interval

    @property
    def reason(self) -> str:
        return (
            f"live acceptance {self.live.mean:.3f} (at most {self.live.high:.3f}, {self.live.requests} requests) "
            f"is below version {self.baseline_version}'s {self.baseline.mean:.3f} (at least {self.baseline.low:.3f})"
        )


@dataclass
class _Watch:
    version: int
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))
    baseline_version: int = 0
    baseline: Interval | None = None


class RolloutGuard:
    """Per route: the running version's acceptance, and the interval it has to hold. Not thread-safe."""

    def __init__(self, min_requests: int) -> None:
        self._min_requests = min_requests
        self._watches: dict[str, _Watch] = {}

    def started(self, route: str, version: int, *, watched: bool) -> None:
        """`version` begins to serve `route`. `watched`: its predecessor's acceptance becomes the mark to hold.

        A version that came by rollback is not watched: it is where the guard itself would go.
        """
        before = self._watches.get(route)
        watch = self._watches[route] = _Watch(version)
        if before is not None and watched:
            # Too little seen of the predecessor says nothing; then its own mark is handed on.
            enough = len(before.rates) >= self._min_requests
            watch.baseline = interval(before.rates) if enough else before.baseline
            watch.baseline_version = before.version if enough else before.baseline_version

    def observe(self, route: str, version: int, acceptance_rate: float) -> Regression | None:
        """Counts one finished request that `version` drafted alone."""
        watch = self._watches.get(route)
        if watch is None or watch.version != version:
            return None
        watch.rates.append(acceptance_rate)
        if watch.baseline is None or len(watch.rates) < self._min_requests:
            return None
        live = interval(watch.rates)
        if live.high >= watch.baseline.low:
            return None
        found = Regression(route, version, watch.baseline_version, live, watch.baseline)
        watch.baseline = None  # Said once.
        return found

    def live(self, route: str) -> Interval | None:
        watch = self._watches.get(route)
        return interval(watch.rates) if watch and watch.rates else None


def interval(rates: deque[float]) -> Interval:
    count = len(rates)
    mean = sum(rates) / count
    variance = sum((rate - mean) ** 2 for rate in rates) / max(1, count - 1)
    half = Z * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)
