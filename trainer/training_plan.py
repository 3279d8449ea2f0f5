"""The training plan: the signals that a cycle trains on, and those that its candidate is held to.

Pure: a route's readable signals in, lists of them out.

A hash of its id holds a request out, in every cycle, so the held-out set
never trains a draft. It has two strata: NEW is the traffic that the
candidate would serve, EARLIER must not be forgotten. Requests after the
active draft's own window are new, whichever cycle claimed them: if a cycle
is refused for lack of proof, the next one has that proof. They are earlier
traffic as well, since the candidate must not forget them.

Beyond its first few signals, no client has more than its share of the
examples or of a stratum while there are other clients. So a client that
floods a large window cannot teach the draft its text alone, nor decide the
gate. It can flood a small window, and a request without a client counts as
a client of its own. The gate stops those floods by the earlier traffic.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from online.buffer import Entry
from online.signals import Signal
from trainer.examples import held_out
from trainer.gate import MIN_REQUESTS


@dataclass(frozen=True, slots=True)
class PlanLimits:
    replayed_signals: int  # older signals in one pass, at most
    held_out_requests: int  # in one stratum, at most
    client_share: float  # of the examples, and of each stratum
    # A client may have this many signals whatever its share: a client with few requests must not
    # limit the others to as few.
    min_client_signals: int = 48


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """Newest first. Only requests after the active draft's own window are in both strata."""

    new: list[Signal]
    earlier: list[Signal]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    passes: list[list[Signal]]  # each: the window, and another part of the older signals
    held_out: HeldOutSet
    left_out: dict[str, int]  # signals beyond their client's share


def make_plan(
    window: Sequence[Signal],
    older: Sequence[Signal],
    limits: PlanLimits,
    recent: Collection[str] = (),
) -> TrainingPlan:
    """Plans a cycle. `window` is oldest first, as claimed; `older` is a sample in any order.

    Uses only signals of targets that answer now, which are those of the
    window's later half. Several may share a draft (S2D, arXiv 2407.01955).
    A replaced target's signals are obsolete.

    `recent`: ids of older requests after the active draft's own window.
    There are as many passes as it takes to replay all older signals, or
    none if there is nothing to train on.
    """
    targets = {s.model for s in window[len(window) // 2 :]}
    new = [s for s in reversed(window) if s.model in targets]
    old = [s for s in older if s.model in targets]
    passes = _passes(new, old, limits)
    held_out_set, beyond = _held_out_set(new, old, limits, recent)
    # The keys are part of the API's cycle reports.
    left_out = {"lessons": passes[0][1], "exam": beyond}
    return TrainingPlan([signals for signals, _ in passes if signals], held_out_set, left_out)


def _passes(
    new: Sequence[Signal], old: Sequence[Signal], limits: PlanLimits
) -> list[tuple[list[Signal], int]]:
    """Every pass, and the signals that it leaves out."""
    share = limits.client_share, limits.min_client_signals
    trained = [s for s in new if not held_out(s)]
    replayed, _ = limit_client_share([s for s in old if not held_out(s)], *share)
    parts = replay_parts(replayed, limits.replayed_signals)
    return [limit_client_share([*trained, *part], *share) for part in parts]


def _held_out_set(
    new: Sequence[Signal],
    old: Sequence[Signal],
    limits: PlanLimits,
    recent: Collection[str],
) -> tuple[HeldOutSet, int]:
    """Both strata, and the new requests beyond their client's share."""
    share, most = (
        (limits.client_share, limits.min_client_signals),
        limits.held_out_requests,
    )
    older = [s for s in old if held_out(s)]
    since = [s for s in older if s.request_id in recent]
    candidates = [*(s for s in new if held_out(s)), *since]
    fresh, beyond = limit_client_share(candidates, *share, most)
    earlier, _ = limit_client_share(older, *share, most)
    if len(fresh) < MIN_REQUESTS:
        # Borrow earlier requests: fewer than the minimum prove nothing.
        others = _without(earlier, fresh)
        fresh, _ = limit_client_share([*fresh, *others], *share, min(MIN_REQUESTS, most))
        earlier, _ = limit_client_share(_without(earlier, fresh, recent), *share)
    return HeldOutSet(fresh, earlier), beyond


def _without(
    signals: Sequence[Signal], taken: Sequence[Signal], unless: Collection[str] = ()
) -> list[Signal]:
    ids = {signal.request_id for signal in taken}
    return [s for s in signals if s.request_id not in ids or s.request_id in unless]


def replay_order(kept: Sequence[Entry], window: Sequence[Entry]) -> list[Entry]:
    """A route's kept sample without the window's entries, in an order that the window decides.

    With one order for all cycles, every cycle would replay the same first
    entries and forget the rest. A repeated cycle has the same order.
    """
    inside = {entry.id for entry in window}
    others = [entry for entry in kept if entry.id not in inside]
    first = window[0].id
    return sorted(others, key=lambda e: hashlib.sha256(f"{first} {e.id}".encode()).digest())


def replay_parts(signals: Sequence[Signal], size: int) -> list[list[Signal]]:
    """Parts of `size` that together contain every signal; the last is filled up from the start."""
    if len(signals) <= size or size == 0:
        return [list(signals[:size])]
    starts = range(0, math.ceil(len(signals) / size) * size, size)
    return [[signals[i % len(signals)] for i in range(at, at + size)] for at in starts]


def limit_client_share(
    signals: Sequence[Signal],
    share: float,
    at_least: int = 0,
    limit: int | None = None,
) -> tuple[list[Signal], int]:
    """The first `limit` signals with no client above `share` or `at_least`; how many were beyond.

    A client keeps its first signals. A share below one signal of every
    client is raised to that. A single client has no bound.
    """
    # A signal without a client counts as a client of its own.
    owners = [signal.client or index for index, signal in enumerate(signals)]
    counts = Counter(owners)
    limit = len(signals) if limit is None else limit
    if len(counts) < 2 or limit < 2:
        return list(signals[:limit]), 0
    allowed = max(_allowed(counts, share, limit), at_least)
    taken: Counter[str | int] = Counter()
    kept = []
    for owner, signal in zip(owners, signals, strict=True):
        taken[owner] += 1
        if taken[owner] <= allowed:
            kept.append(signal)
    return kept[:limit], len(signals) - len(kept)


def _allowed(counts: "Counter[str | int]", share: float, limit: int) -> int:
    """The most signals of one client that are within the share of all that are then kept."""
    share = max(share, 1 / min(limit, len(counts)))
    for most in range(max(counts.values()), 1, -1):
        kept = sum(min(count, most) for count in counts.values())
        if most <= share * min(limit, kept) + 1e-9:
            return most
    return 1
