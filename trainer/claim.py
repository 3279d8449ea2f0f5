"""What a cycle claims: a window of new signals, and everything that depends on it alone."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from online.buffer import Entry, id_order
from online.errors import SignalError
from online.leases import Lease
from online.signals import Signal, decode
from online.tables import Version
from trainer.context import CycleContext
from trainer.examples import usable
from trainer.recipe import Recipe
from trainer.recipe_search import configured_recipe
from trainer.training_plan import PlanLimits, TrainingPlan, make_plan, replay_order

log = logging.getLogger("slipstream.trainer")


@dataclass(frozen=True, slots=True)
class Claim:
    """A cycle's input. The same window gives the same claim, so a repeated cycle is identical."""

    lease: Lease
    route: str
    parent: Version
    module: nn.Module  # the parent's weights; training changes them in place
    window: list[Entry]  # never empty
    new: dict[str, Signal]  # of the window, by entry id in order; unreadable ones left out
    old: dict[str, Signal]  # of the route's kept sample, by entry id in the order to replay
    recipe: Recipe

    @property
    def pad_id(self) -> int:
        return int(self.module.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]

    def plan(self, limits: PlanLimits) -> TrainingPlan:
        last = self.parent.window.get("last")
        # Every older signal is recent if the parent's window is unknown.
        recent = {
            signal.request_id
            for entry, signal in self.old.items()
            if last is None or id_order(entry) > id_order(last)
        }
        return make_plan(list(self.new.values()), list(self.old.values()), limits, recent)

    def span(self, plan: TrainingPlan) -> dict[str, Any]:
        """The window as the version and the cycle's report store it."""
        trained_on = {s.request_id for signals in plan.passes for s in signals}
        return {
            "first": self.window[0].id,
            "last": self.window[-1].id,
            "signals": len(self.new),
            "trained_on": len(trained_on),
            "unreadable": len(self.window) - len(self.new),
            "left_out": plan.left_out,
        }


def claim_window(context: CycleContext, lease: Lease) -> Claim | str:
    """Claims the route's next window; returns a reason if there is nothing to train.

    Raises:
        LeaseLost: another worker has taken the cycle over.
    """
    route = context.ledger.cycle(lease.cycle_id).route
    parent = context.registry.serving(route)
    window = _unused_entries(context, route)
    if parent is None:
        return "no draft yet"
    if not window:
        return "no signals"
    context.ledger.set_window(lease, window[0].id, window[-1].id)

    module = context.weights.load(parent)
    vocab_size = module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    new = _readable(window, vocab_size)
    old = _readable(replay_order(context.buffer.kept(route), window), vocab_size)
    teaching = context.registry.route(route).teaching
    recipe = configured_recipe(context.settings, teaching, lease.cycle_id)
    return Claim(lease, route, parent, module, window, new, old, recipe)


def _unused_entries(context: CycleContext, route: str) -> list[Entry]:
    """The window, without entries that an earlier cycle used.

    Redis claims those again if it has forgotten their acknowledgement.
    """
    while entries := context.buffer.claim(route, context.settings.cycle_max_signals):
        used = context.ledger.watermark(route)
        stale = [e for e in entries if used is not None and id_order(e.id) <= id_order(used)]
        if not stale:
            return entries
        context.buffer.acknowledge(route, [entry.id for entry in stale])
        if len(stale) < len(entries):
            return entries[len(stale) :]
    return []


def _readable(entries: Sequence[Entry], vocab_size: int) -> dict[str, Signal]:
    """Signals that this draft can train on, by entry id in order."""
    signals = {}
    for entry in entries:
        try:
            signal = decode(entry.record)
        except SignalError as error:
            log.warning("signal %s left out: %s", entry.id, error)
            continue
        if usable(signal, vocab_size):
            signals[entry.id] = signal
    return signals
