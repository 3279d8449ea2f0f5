"""Canaries on this decoder: a candidate gets a share of its route's new requests, and its acceptance decides.

A test begins anew where the decoder does, and several decoders of a route test each for themselves: the ledger takes
the first decision. All methods are the swapper's thread's, but for `seen`.
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
from online.rollout import CanaryTest, Rules
from online.tables import Canary

log = logging.getLogger("slipstream.canary")

ACTOR = "canary"


@dataclass
class _Running:
    canary: Canary
    test: CanaryTest
    since_s: float  # requests that came before belong to neither arm: short ones end first, and only in one of them
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
        """Begins what the ledger says is running, ends what is not, and gives up what can't be served."""
        ledger = self._ledger.running()
        for route, draft in self._drafts.items():
            canary, ours = ledger.get(route), self._running.get(route)
            if ours is not None and (canary is None or canary.id != ours.canary.id):
                self._end(draft)
                ours = None
            if canary is None:
                continue
            if ours is None and draft.version == canary.beside_version:
                self._begin(draft, canary)
            elif ours is not None and draft.canary is not None and not draft.canary.usable:
                self._finish(
                    canary, "aborted", "its draft failed while it served", even_frozen=True
                )

    def observe(
        self, route: str, version: int, acceptance_rate: float | None, arrived_s: float
    ) -> None:
        """A request of the route has ended that `version` served alone."""
        ours = self._running.get(route)
        if ours is not None and arrived_s >= ours.since_s:
            ours.test.observe(version, acceptance_rate)

    def decide(self) -> bool:
        """Writes the decisions that are due. Returns whether something may have changed."""
        changed = False
        for route, ours in self._running.items():
            self._show(route, ours.test)
            decision = ours.test.decision()
            if decision is None:
                continue
            if self._registry.route(route).frozen:
                if not ours.held:
                    self._registry.record(
                        ACTOR,
                        "canary:held",
                        route,
                        f"frozen; {decision.outcome}: {decision.reason}",
                    )
                ours.held = True
                continue
            self._finish(ours.canary, decision.outcome, decision.reason)
            changed = True
        return changed

    def seen(self, route: str) -> CanarySeen | None:
        """What both arms have shown so far. Any thread may ask."""
        ours = self._running.get(route)
        if ours is None:
            return None
        arms = (ours.test.version, ours.test.canary), (ours.test.beside, ours.test.active)
        return CanarySeen(
            *(ArmSeen(v, arm.requests, arm.mean if arm.requests else None) for v, arm in arms)
        )

    def _begin(self, draft: LiveDraft, canary: Canary) -> None:
        if draft.canary is None:
            self._finish(
                canary,
                "aborted",
                "a decoder of this route has canary_share 0: no room",
                even_frozen=True,
            )
            return
        version = self._registry.version(canary.version)
        try:
            self._installer.load(draft.canary, version)
        except Exception as error:
            # Whatever it was, nobody waits for this version: the active one goes on.
            log.exception("canary %d of route %s can't be loaded", canary.id, canary.route)
            self._finish(canary, "aborted", f"it can't be loaded: {error}", even_frozen=True)
            return
        draft.share = canary.share
        test = CanaryTest(canary.version, canary.beside_version, self._rules)
        self._running[canary.route] = _Running(canary, test, time.monotonic())
        self._metrics.canary_share.labels(canary.route).set(canary.share)
        log.info(
            "route %s: version %d drafts for %g of the requests",
            canary.route,
            canary.version,
            canary.share,
        )

    def _end(self, draft: LiveDraft) -> None:
        """New requests get the active draft again. Those that the canary began it also ends: its weights stay."""
        draft.share = 0.0
        del self._running[draft.route]
        self._metrics.canary_share.labels(draft.route).set(0)

    def _finish(
        self, canary: Canary, outcome: Outcome, reason: str, *, even_frozen: bool = False
    ) -> None:
        try:
            self._ledger.finish(canary, outcome, ACTOR, reason, even_frozen=even_frozen)
        except Conflict as error:
            log.info(
                "canary %d of route %s was not %s: %s", canary.id, canary.route, outcome, error
            )
        else:
            log.warning("canary %d of route %s %s: %s", canary.id, canary.route, outcome, reason)

    def _show(self, route: str, test: CanaryTest) -> None:
        for name, arm in (("canary", test.canary), ("active", test.active)):
            if arm.requests:
                self._metrics.canary_acceptance.labels(route, name).set(arm.mean)
