"""Who may draft: a candidate's trial beside the active version, and the guard over a version that has become active.

Both compare live acceptance (Σ min(p, q) of finished requests that one version served alone) by the confidence
sequence of `online.sequential`. Pure bookkeeping: who calls it and writes what follows is the decoder, so that neither
trainer nor Redis is needed.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from online.sequential import Arm, Difference, difference

KEPT_REQUESTS = 500  # recent requests that stand for a version's live acceptance
LATELY = 50  # the last of them: what came since the traffic shifted, where that is why the successor was made
WATCHED_REQUESTS = 100  # first requests of a version that the guard compares with its predecessor's


@dataclass(frozen=True, slots=True)
class Rules:
    """When a comparison may speak."""

    min_requests: int  # of either version, before anything is decided by acceptance
    max_requests: int  # of each version, compared or not: then it is decided, one way or the other
    margin: float  # acceptance that a candidate may lose: the gate has shown it better on held-out requests


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Literal["promoted", "aborted"]
    reason: str


class Trial:
    """A canary's acceptance beside the active version's, both taken over the same time."""

    def __init__(self, version: int, beside: int, rules: Rules) -> None:
        self.version, self.beside, self._rules = version, beside, rules
        self.canary, self.active = Arm(), Arm()
        self._requests = {version: 0, beside: 0}  # also those that compared no position

    def observe(self, version: int, acceptance_rate: float | None) -> None:
        """Counts one finished request that `version` served alone."""
        if version not in self._requests:
            return
        self._requests[version] += 1
        if acceptance_rate is not None:
            (self.canary if version == self.version else self.active).add(acceptance_rate)

    def verdict(self) -> Verdict | None:
        """Promoted when it loses less than the margin, aborted when it loses anything, both with confidence.

        After `max_requests` without either the means decide. One that could not be compared, because plain steps are
        faster here than any draft, is taken at the gate's word.
        """
        seen = self._difference()
        if seen is not None and seen.low > -self._rules.margin:
            return Verdict("promoted", f"{self._figures(seen)}: above −{self._rules.margin:g}")
        if seen is not None and seen.high < 0:
            return Verdict("aborted", f"{self._figures(seen)}: below 0")
        if (requests := min(self._requests.values())) < self._rules.max_requests:
            return None
        if seen is None:
            return Verdict(
                "promoted",
                f"{requests} requests and too few comparisons: on the gate's report alone",
            )
        outcome: Literal["promoted", "aborted"] = (
            "promoted" if seen.mean >= -self._rules.margin else "aborted"
        )
        return Verdict(
            outcome, f"{self._figures(seen)}: undecided after {requests} requests, by the mean"
        )

    def _difference(self) -> Difference | None:
        enough = min(self.canary.requests, self.active.requests) >= self._rules.min_requests
        return difference(self.canary, self.active) if enough else None

    def _figures(self, seen: Difference) -> str:
        return (
            f"acceptance {self.canary.mean:.3f} over {self.canary.requests} requests, version {self.beside}'s "
            f"{self.active.mean:.3f} over {self.active.requests}, difference {seen}"
        )


@dataclass(frozen=True, slots=True)
class Regression:
    """What the guard found: `version` accepts less than `baseline_version` did."""

    route: str
    version: int
    baseline_version: int
    live: Arm
    baseline: Arm

    @property
    def reason(self) -> str:
        return (
            f"live acceptance {self.live.mean:.3f} over {self.live.requests} requests is below version "
            f"{self.baseline_version}'s {self.baseline.mean:.3f}: difference {difference(self.live, self.baseline)}"
        )


@dataclass
class _Watch:
    version: int
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_REQUESTS))
    seen: Arm = field(default_factory=Arm)
    baseline_version: int = 0
    baseline: tuple[
        Arm, ...
    ] = ()  # its predecessor's recent requests: all of them, and the last ones

    @property
    def marks(self) -> tuple[Arm, ...]:
        return arm(self.recent), arm(list(self.recent)[-LATELY:])


class RolloutGuard:
    """Per route: the running version's acceptance, and its predecessor's, which it has to hold. Not thread-safe.

    The two were served one after the other, so a shift of the traffic looks like a bad version, and it is after a
    shift that versions are made. So one is worse only if it accepts less than its predecessor did over all of its
    recent requests, and also less than over the last ones. A spoilt one shows within some twenty requests: a version is
    watched for its first `WATCHED_REQUESTS`, and what falls later is the traffic's doing.
    """

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
            enough = len(before.recent) >= self._min_requests
            watch.baseline = before.marks if enough else before.baseline
            watch.baseline_version = before.version if enough else before.baseline_version

    def observe(self, route: str, version: int, acceptance_rate: float) -> Regression | None:
        """Counts one finished request that `version` served alone."""
        watch = self._watches.get(route)
        if watch is None or watch.version != version:
            return None
        watch.recent.append(acceptance_rate)
        watch.seen.add(acceptance_rate)
        if not watch.baseline or not self._min_requests <= watch.seen.requests <= WATCHED_REQUESTS:
            return None
        nearest = max(watch.baseline, key=lambda mark: difference(watch.seen, mark).high)
        if difference(watch.seen, nearest).high >= 0:
            return None
        watch.baseline = ()  # Said once.
        return Regression(route, version, watch.baseline_version, watch.seen, nearest)

    def live(self, route: str) -> float | None:
        """Mean acceptance of the version's recent requests."""
        watch = self._watches.get(route)
        return arm(watch.recent).mean if watch and watch.recent else None


def arm(rates: Iterable[float]) -> Arm:
    made = Arm()
    for rate in rates:
        made.add(rate)
    return made
