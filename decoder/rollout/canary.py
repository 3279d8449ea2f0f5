"""Canaries on this decoder: a candidate drafts for a share of a route's new requests.

Live acceptance decides whether it is promoted. A decoder that restarts begins its test anew.
Several decoders of a route each run their own test; the ledger takes the first decision.
Every method runs on the swapper's thread, except `seen`.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from decoder.rollout.installer import Installer
from decoder.rollout.live import LiveDraft
from online.canaries import CanaryLedger, Outcome
from online.errors import Conflict
from online.messages import ArmSeen, CanarySeen
from online.metrics import ServiceMetrics
from online.registry import Registry
from online.rollout import CanaryTest, Decision, Rules
from online.tables import Canary

log = logging.getLogger("slipstream.canary")

ACTOR = "canary"


@dataclass
class _Running:
    canary: Canary
    test: CanaryTest
    # Earlier requests count in neither arm: the short ones among them would end first.
    since_s: float
    held: bool = False  # there is a decision, and the route is frozen


class CanaryController:
    def __init__(
        self,
        drafts: Mapping[str, LiveDraft],
        installer: Installer,
        registry: Registry,
        ledger: CanaryLedger,
        rules: Rules,
        metrics: ServiceMetrics,
    ) -> None:
        self._drafts, self._installer = drafts, installer
        self._registry, self._ledger = registry, ledger
        self._rules, self._metrics = rules, metrics
        self._running: dict[str, _Running] = {}

    def follow(self) -> None:
        """Starts canaries that the ledger has opened, and stops those that it has closed.

        A canary whose draft can't be loaded, or fails while serving, is aborted.
        """
        ledger = self._ledger.running()
        for route, draft in self._drafts.items():
            canary = ledger.get(route)
            running = self._running.get(route)
            if running is not None and (canary is None or canary.id != running.canary.id):
                self._stop(draft)
                running = None
            if canary is None:
                continue
            if running is None and draft.version == canary.beside_version:
                self._start(draft, canary)
            elif running is not None and draft.canary is not None and not draft.canary.usable:
                self._abort(canary, "its draft failed while it served")

    def observe(
        self, route: str, version: int, acceptance_rate: float | None, arrived_s: float
    ) -> None:
        """Counts a finished request of the route that `version` served alone."""
        running = self._running.get(route)
        if running is not None and arrived_s >= running.since_s:
            running.test.observe(version, acceptance_rate)

    def decide(self) -> bool:
        """Writes decisions to the ledger. True if the active versions may have changed."""
        changed = False
        for route, running in self._running.items():
            self._export(route, running.test)
            decision = running.test.decision()
            if decision is None:
                continue
            if self._registry.route(route).frozen:
                self._hold(running, decision)
                continue
            self._finish(running.canary, decision.outcome, decision.reason)
            changed = True
        return changed

    def seen(self, route: str) -> CanarySeen | None:
        """Requests and mean acceptance of both arms so far. Any thread may ask."""
        running = self._running.get(route)
        if running is None:
            return None
        test = running.test
        arms = (test.version, test.canary), (test.beside, test.active)
        return CanarySeen(
            *(
                ArmSeen(version, arm.requests, arm.mean if arm.requests else None)
                for version, arm in arms
            )
        )

    def _start(self, draft: LiveDraft, canary: Canary) -> None:
        if draft.canary is None:
            self._abort(canary, "a decoder of this route has canary_share 0: no room")
            return
        version = self._registry.version(canary.version)
        try:
            self._installer.load(draft.canary, version)
        except Exception as error:
            # Whatever the fault, the active version goes on.
            log.exception("Canary %d of route %s can't be loaded.", canary.id, canary.route)
            self._abort(canary, f"it can't be loaded: {error}")
            return
        route, share = canary.route, canary.share
        draft.share = share
        test = CanaryTest(canary.version, canary.beside_version, self._rules)
        self._running[route] = _Running(canary, test, time.monotonic())
        self._metrics.canary_share.labels(route).set(share)
        log.info("Route %s: version %d drafts for %g of requests.", route, canary.version, share)

    def _stop(self, draft: LiveDraft) -> None:
        """New requests get the active draft. The canary finishes those that it has begun."""
        draft.share = 0.0
        del self._running[draft.route]
        self._metrics.canary_share.labels(draft.route).set(0)

    def _hold(self, running: _Running, decision: Decision) -> None:
        """On a frozen route a decision is only recorded, once."""
        if not running.held:
            detail = f"frozen; {decision.outcome}: {decision.reason}"
            self._registry.record(ACTOR, "canary:held", running.canary.route, detail)
        running.held = True

    def _abort(self, canary: Canary, reason: str) -> None:
        """A canary that can't serve ends even on a frozen route."""
        self._finish(canary, "aborted", reason, even_frozen=True)

    def _finish(
        self, canary: Canary, outcome: Outcome, reason: str, *, even_frozen: bool = False
    ) -> None:
        name = f"Canary {canary.id} of route {canary.route}"
        try:
            self._ledger.finish(canary, outcome, ACTOR, reason, even_frozen=even_frozen)
        except Conflict as error:
            log.info("%s was not %s: %s", name, outcome, error)
        else:
            log.warning("%s was %s: %s", name, outcome, reason)

    def _export(self, route: str, test: CanaryTest) -> None:
        for name, arm in (("canary", test.canary), ("active", test.active)):
            if arm.requests:
                self._metrics.canary_acceptance.labels(route, name).set(arm.mean)
