"""One training cycle, in a process of its own: claim → distil → gate → register → acknowledge.

    python -m trainer.cycle --cycle ID --fence N --worker PID

It may be killed at any point. Until `conclude` commits, nothing has happened but a lease; after it, the window is used,
whether or not Redis hears the acknowledgement.
"""

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from online.artifacts import ArtifactStore
from online.buffer import Entry, SignalBuffer, id_order
from online.connections import git_commit, signal_buffer
from online.cycles import CycleLedger
from online.database import connect, now
from online.errors import SignalError, SlipstreamError
from online.leases import Lease, LeaseLost
from online.registry import Registry
from online.settings import Settings
from online.signals import Signal, decode
from online.tables import Version
from online.versions import Candidate, is_generic
from trainer.batches import usable
from trainer.distill import Recipe, distill
from trainer.evaluation import served_gamma
from trainer.exit_codes import EXIT_LEASE_LOST, EXIT_REPORTED
from trainer.gate import GateReport, compare_drafts, json_ready
from trainer.recipe_search import choose_recipe, configured_recipe
from trainer.training_plan import HeldOutSet, PlanLimits, TrainingPlan, make_plan, replay_order
from trainer.weights import Weights

log = logging.getLogger("slipstream.trainer")

HELD_OUT_SIGNALS = 200  # maximum of held-out requests that the gate compares on
NICENESS, SESSION_NICENESS = 10, 4


@dataclass(frozen=True, slots=True)
class CycleContext:
    """What a cycle works with."""

    settings: Settings
    registry: Registry
    ledger: CycleLedger
    buffer: SignalBuffer
    artifacts: ArtifactStore

    @classmethod
    def of(cls, settings: Settings) -> "CycleContext":
        database = connect(settings.sql_url)
        return cls(
            settings,
            Registry(database),
            CycleLedger(database),
            signal_buffer(settings),
            ArtifactStore(settings.artifacts_path),
        )

    @property
    def weights(self) -> Weights:
        return Weights(self.settings, self.registry, self.artifacts)


def run(context: CycleContext, lease: Lease, on_step: Callable[[], None] = lambda: None) -> str:
    """Works a leased cycle to its end and returns its state.

    Raises:
        LeaseLost: another worker has taken the cycle over.
    """
    route = context.ledger.cycle(lease.cycle_id).route
    parent = context.registry.serving(route)
    window = _claim(context, route)
    if parent is None or not window:
        return context.ledger.finish(
            lease, "empty", {"reason": "no draft yet" if parent is None else "no signals"}
        ).state
    context.ledger.set_window(lease, window[0].id, window[-1].id)

    module = context.weights.load(parent)
    vocab_size = module.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    new = list(_readable(window, vocab_size).values())
    old = _readable(replay_order(context.buffer.kept(route), window), vocab_size)
    recipe = configured_recipe(context.settings, route, lease.cycle_id)
    bounds = PlanLimits(
        context.settings.replay_signals,
        HELD_OUT_SIGNALS,
        context.settings.client_share,
    )
    chosen = make_plan(new, list(old.values()), bounds, _after(old, parent.window.get("last")))
    chosen = replace(chosen, passes=chosen.passes[: recipe.epochs])
    span = {
        "first": window[0].id,
        "last": window[-1].id,
        "signals": len(new),
        "trained_on": len({s.request_id for examples in chosen.passes for s in examples}),
        "unreadable": len(window) - len(new),
        "left_out": chosen.left_out,
    }
    learnt = (
        _learn(context, lease, route, parent, module, recipe, chosen, span, on_step)
        if chosen.passes
        else None
    )
    # Before the end of the cycle: a fault behind it would lose the window for replay, and nothing is kept twice.
    context.buffer.keep(route, window, context.settings.kept_signals)
    if learnt is None:
        cycle = context.ledger.finish(
            lease, "empty", {"reason": "no usable signals", "window": span}
        )
    else:
        made, report, figures = learnt
        # A route that began with a generic draft is a cluster. There is no room for a second draft beside a cluster's.
        share = (
            0.0
            if is_generic(context.registry.versions(route)[-1])
            else context.settings.canary_share
        )
        cycle = context.ledger.conclude(lease, parent, made, report.promote, figures, share)
        log.info(
            "cycle %d: %s, %s (%.1f s of training)",
            cycle.id,
            cycle.state,
            report.reason,
            figures["train_s"],
        )
    # Ack after register: a crash repeats a cycle, it never loses signals.
    context.buffer.acknowledge(route, [entry.id for entry in window])
    _tidy(context)
    return cycle.state


def _learn(
    context: CycleContext,
    lease: Lease,
    route: str,
    parent: Version,
    module: nn.Module,
    recipe: Recipe,
    chosen: TrainingPlan,
    span: dict[str, Any],
    on_step: Callable[[], None],
) -> tuple[Candidate, GateReport, dict[str, Any]]:
    """Distils, publishes and judges: the candidate, what the gate says of it, and the cycle's figures."""
    settings, started, found = context.settings, time.monotonic(), {}
    pad_id = int(module.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
    gamma = served_gamma(chosen.exam.new, settings.gamma or 1)
    # Held to their parents alone, versions would forget a little more each time.
    earlier_draft = context.weights.first(route) if recipe.rehearsal else None
    if settings.search_recipe:
        found = choose_recipe(
            module, chosen.passes[0], recipe, parent, gamma, pad_id, on_step, earlier_draft
        )
        recipe = replace(recipe, **found["choice"])
    distilled = distill(module, chosen.passes, recipe, pad_id, on_step, earlier_draft)
    train_s = time.monotonic() - started
    digest = context.artifacts.publish(lambda folder: context.weights.save(module, parent, folder))
    report = _judged(context, parent, digest, chosen.exam, gamma, pad_id, lease.cycle_id)
    on_step()
    told = {**recipe.as_dict(), **found, "steps": distilled.steps, "positions": distilled.positions}
    made = Candidate(digest, json_ready(told), span, report.as_dict(), git_commit())
    figures = {
        "window": span,
        "gate": report.as_dict(),
        "first_loss": distilled.first_loss,
        "last_loss": distilled.last_loss,
        "train_s": round(train_s, 2),
    }
    return made, report, json_ready(figures)


def _judged(
    context: CycleContext,
    parent: Version,
    digest: str,
    exam: HeldOutSet,
    gamma: int,
    pad_id: int,
    seed: int,
) -> GateReport:
    """The candidate as it would be served: rounded to its stored precision, read back from disk."""
    active, candidate = context.weights.load(parent), context.weights.read(digest)
    tolerance = context.settings.forgetting_tolerance
    return compare_drafts(
        active,
        candidate,
        exam.new,
        exam.earlier,
        gamma=gamma,
        pad_id=pad_id,
        tolerance=tolerance,
        seed=seed,
    )


def _tidy(context: CycleContext) -> None:
    """Refused candidates stay for as long as signals do, to be looked at; then their weights go, or disks fill."""
    try:
        refused = context.registry.refused(now() - timedelta(seconds=context.settings.retention_s))
        if gone := context.artifacts.sweep(refused, context.settings.cycle_limit_s):
            log.info("deleted the weights of refused or unfinished candidates: %s", ", ".join(gone))
    except (OSError, SlipstreamError) as error:
        log.warning("old candidates stay on disk: %s", error)


def _claim(context: CycleContext, route: str) -> list[Entry]:
    """The window, without entries that an earlier cycle has used: Redis may have forgotten their acknowledgement."""
    entries = context.buffer.claim(route, context.settings.cycle_max_signals)
    used = context.ledger.watermark(route)
    stale = [e for e in entries if used is not None and id_order(e.id) <= id_order(used)]
    if stale:
        context.buffer.acknowledge(route, [e.id for e in stale])
        return entries[len(stale) :] or _claim(context, route)
    return entries


def _after(signals: Mapping[str, Signal], last: str | None) -> set[str]:
    """Requests that came after the last entry of a version's window; all where it was not made from signals."""
    return {
        s.request_id
        for entry, s in signals.items()
        if last is None or id_order(entry) > id_order(last)
    }


def _readable(entries: Sequence[Entry], vocab_size: int) -> dict[str, Signal]:
    """By entry id, in order: signals that teach something."""
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


class LeaseKeeper:
    """Keeps the lease while the cycle works, and notices when it or the parent process is gone."""

    def __init__(self, ledger: CycleLedger, lease: Lease, lease_s: float, worker: int) -> None:
        self._ledger, self._lease, self._every_s, self._worker = ledger, lease, lease_s / 4, worker
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def check(self) -> None:
        if self._lost.is_set():
            raise LeaseLost(f"cycle {self._lease.cycle_id} was taken over")

    def _beat(self) -> None:
        while not self._stop.wait(min(1.0, self._every_s)):
            if os.getppid() != self._worker:
                os._exit(
                    EXIT_LEASE_LOST
                )  # The worker was killed: its successor will take the cycle over.
            try:
                self._ledger.heartbeat(self._lease)
            except LeaseLost:
                self._lost.set()
                return
            except SlipstreamError as error:
                log.warning("heartbeat: %s", error)


def lower_priority() -> None:
    """Serving comes first, also on one machine.

    Linux shares the processor between sessions before it looks at niceness inside one, so the session (this process
    leads its own) is made nice too; mildly, for a very light session is left to starve on the core where it stands.
    """
    os.nice(NICENESS)
    try:
        Path("/proc/self/autogroup").write_text(str(SESSION_NICENESS))
    except OSError:
        pass  # another system, or sessions are not grouped: then niceness alone counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.cycle", description=__doc__)
    parser.add_argument("--cycle", type=int, required=True)
    parser.add_argument(
        "--fence", type=int, required=True, help="of the lease that the worker took"
    )
    parser.add_argument(
        "--worker", type=int, default=os.getppid(), help="process to end with; default: the parent"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    settings = Settings()
    torch.set_num_threads(settings.trainer_threads)
    if settings.trainer_device == "cpu":
        lower_priority()
    context, lease = CycleContext.of(settings), Lease(args.cycle, args.fence)
    with LeaseKeeper(context.ledger, lease, settings.lease_s, args.worker) as keeper:
        try:
            run(context, lease, keeper.check)
        except LeaseLost as error:
            log.warning("%s", error)
            sys.exit(EXIT_LEASE_LOST)
        except Exception as error:
            # Whatever it was, the operator reads it in the ledger, not in a log of a machine that may be gone.
            log.exception("cycle %d failed", lease.cycle_id)
            context.ledger.release(lease, f"{type(error).__name__}: {error}")
            sys.exit(EXIT_REPORTED)


if __name__ == "__main__":
    main()
