"""One training cycle, in a process of its own: claim → train → gate → register → acknowledge.

    python -m trainer.cycle --cycle ID --fence N --worker PID

It may be killed at any point. Until `register` commits, only a lease has
changed. After that the window is used, whether or not Redis receives the
acknowledgement.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import transformers

from online.connections import git_commit
from online.database import now
from online.errors import SlipstreamError
from online.leases import Lease, LeaseLost
from online.settings import Settings
from online.tables import Cycle
from online.versions import Candidate, is_generic
from trainer.candidate import TrainedDraft, run_gate, train_draft
from trainer.claim import Claim, claim_window
from trainer.context import CycleContext
from trainer.exit_codes import EXIT_LEASE_LOST, EXIT_REPORTED
from trainer.gate import GateReport, json_ready
from trainer.lease_keeper import LeaseKeeper, lower_priority
from trainer.training_plan import PlanLimits, TrainingPlan

log = logging.getLogger("slipstream.trainer")

HELD_OUT_REQUESTS = 200  # that the gate compares drafts on, at most


def run(
    context: CycleContext,
    lease: Lease,
    check_lease: Callable[[], None] = lambda: None,
) -> str:
    """Works a leased cycle to its end and returns the cycle's state.

    Raises:
        LeaseLost: another worker has taken the cycle over.
    """
    claim = claim_window(context, lease)
    if isinstance(claim, str):
        return context.ledger.finish(lease, "empty", {"reason": claim}).state
    plan = _plan(context.settings, claim)
    window = claim.span(plan)

    trained = report = None
    if plan.passes:
        trained = train_draft(context, claim, plan, check_lease)
        report = run_gate(context, claim, plan, trained)
        check_lease()

    # Keep before the end of the cycle: a fault after the end would lose the window for replay,
    # and keeping an entry twice has no effect.
    context.buffer.keep(claim.route, claim.window, context.settings.kept_signals)
    if trained is None or report is None:
        empty = {"reason": "no usable signals", "window": window}
        cycle = context.ledger.finish(lease, "empty", empty)
    else:
        cycle = register(context, claim, window, trained, report)
    # Ack after register: a crash repeats a cycle, it never loses signals.
    context.buffer.acknowledge(claim.route, [entry.id for entry in claim.window])
    tidy(context)
    return cycle.state


def _plan(settings: Settings, claim: Claim) -> TrainingPlan:
    """The cycle's signals: one pass an epoch."""
    limits = PlanLimits(settings.replay_signals, HELD_OUT_REQUESTS, settings.client_share)
    plan = claim.plan(limits)
    return replace(plan, passes=plan.passes[: claim.recipe.epochs])


def register(
    context: CycleContext,
    claim: Claim,
    window: dict[str, Any],
    trained: TrainedDraft,
    report: GateReport,
) -> Cycle:
    """Ends the cycle with a version: promoted, on trial as a canary, or rejected."""
    gate, distilled = report.as_dict(), trained.distilled
    made = Candidate(trained.digest, trained.recipe, window, gate, git_commit())
    figures = {
        "window": window,
        "gate": gate,
        "first_loss": distilled.first_loss,
        "last_loss": distilled.last_loss,
        "train_s": round(trained.train_s, 2),
    }
    share = _canary_share(context, claim.route)
    cycle = context.ledger.conclude(
        claim.lease, claim.parent, made, report.promote, json_ready(figures), share
    )
    trained_s = f"{trained.train_s:.1f} s of training"
    log.info("cycle %d: %s, %s (%s)", cycle.id, cycle.state, report.reason, trained_s)
    return cycle


def _canary_share(context: CycleContext, route: str) -> float:
    # A route that began with a generic draft is a cluster, which has no slot for a second draft.
    first = context.registry.versions(route)[-1]
    return 0.0 if is_generic(first) else context.settings.canary_share


def tidy(context: CycleContext) -> None:
    """Deletes the weights of old refused candidates, which would fill the disk.

    They stay for inspection as long as signals do.
    """
    settings = context.settings
    try:
        refused = context.registry.refused(now() - timedelta(seconds=settings.retention_s))
        if gone := context.artifacts.sweep(refused, settings.cycle_limit_s):
            log.info(
                "deleted the weights of refused or unfinished candidates: %s",
                ", ".join(gone),
            )
    except (OSError, SlipstreamError) as error:
        log.warning("cannot delete old candidates: %s", error)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.cycle", description=__doc__)
    parser.add_argument("--cycle", type=int, required=True)
    parser.add_argument("--fence", type=int, required=True, help="the fence of the worker's lease")
    parser.add_argument(
        "--worker",
        type=int,
        default=os.getppid(),
        help="end when this process ends (default: the parent)",
    )
    return parser.parse_args()


def main() -> None:
    args, settings = _arguments(), Settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
            # The operator reads the ledger; the log may be on a machine that is gone.
            log.exception("cycle %d failed", lease.cycle_id)
            context.ledger.release(lease, f"{type(error).__name__}: {error}")
            sys.exit(EXIT_REPORTED)


if __name__ == "__main__":
    main()
