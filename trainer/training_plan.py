"""The curriculum: which signals a cycle trains on, and which its candidate is examined on.

Pure: a route's readable signals in, lists of them out.

A request is held out by the hash of its id, in every cycle, so what is examined was never trained on. The exam has two
strata: NEW is the traffic that the candidate would serve, EARLIER what it must not forget. What came after the active
draft's own window is new, whichever cycle claimed it: of a cycle that was refused for want of proof, the next one has
the proof. It is earlier traffic all the same, which the candidate must not forget.

Beyond its first few signals no client has more than its share of the lessons or of a stratum while there are others, so
one that floods a large window can neither teach the draft its own text alone nor be the judge of it. Of a small window
it can, and where nobody says who asks every request counts as a client of its own: such floods are the gate's to stop,
by the earlier traffic.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from online.buffer import Entry
from online.signals import Signal
from trainer.batches import held_out
from trainer.gate import MIN_REQUESTS


@dataclass(frozen=True, slots=True)
class PlanLimits:
    replay: int  # older signals trained on again in one pass, at most
    exam: int  # requests of a stratum, at most
    client_share: float  # of the lessons, and of each stratum
    fewest: int = 48  # signals that a client may have whatever its share: one who hardly asks must not silence the rest


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """Newest first. Only requests that came since the active draft's own window are in both."""

    new: list[Signal]
    earlier: list[Signal]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    passes: list[
        list[Signal]
    ]  # what each learns from: the window, and every time others of the older signals
    exam: HeldOutSet
    left_out: dict[
        str, int
    ]  # signals that were beyond their client's share, of the lessons and of the exam


def make_plan(
    window: Sequence[Signal],
    older: Sequence[Signal],
    bounds: PlanLimits,
    recent: Collection[str] = (),
) -> TrainingPlan:
    """`window` is oldest first, as it was claimed; `older` a sample in no order.

    Only those of targets that answer now are used: several may, with one draft for all of them (S2D, arXiv 2407.01955),
    and what one said that has been replaced is no longer true of anything. Now is the later half of the window.

    `recent`: ids of older requests that came after the active draft's own window. There are as many passes as it takes
    to replay all that is older, of which a cycle makes the first; none where there is nothing to learn.
    """
    targets = {s.model for s in window[len(window) // 2 :]}
    new, old = ([s for s in side if s.model in targets] for side in (reversed(window), older))
    share = bounds.client_share, bounds.fewest
    learnt = [s for s in new if not held_out(s)]
    replayed, _ = limit_client_share([s for s in old if not held_out(s)], *share)
    passes = [
        limit_client_share([*learnt, *part], *share)
        for part in replay_parts(replayed, bounds.replay)
    ]
    since = [s for s in old if held_out(s) and s.request_id in recent]
    fresh, unasked = limit_client_share(
        [*(s for s in new if held_out(s)), *since], *share, bounds.exam
    )
    known, _ = limit_client_share([s for s in old if held_out(s)], *share, bounds.exam)
    if len(fresh) < MIN_REQUESTS:
        asked = {signal.request_id for signal in fresh}
        others = [s for s in known if s.request_id not in asked]
        fresh, _ = limit_client_share([*fresh, *others], *share, min(MIN_REQUESTS, bounds.exam))
        asked = {signal.request_id for signal in fresh}
        known, _ = limit_client_share(
            [s for s in known if s.request_id not in asked or s.request_id in recent], *share
        )
    left_out = {"lessons": passes[0][1], "exam": unasked}
    return TrainingPlan(
        [examples for examples, _ in passes if examples], HeldOutSet(fresh, known), left_out
    )


def replay_order(kept: Sequence[Entry], window: Sequence[Entry]) -> list[Entry]:
    """A route's kept sample without what is in the window, in an order of this window's own.

    Were the first ones of a cycle those of every cycle, they would be learnt by heart and the rest forgotten. Tried
    again, a cycle has the same order.
    """
    inside = {entry.id for entry in window}
    others = [entry for entry in kept if entry.id not in inside]
    return sorted(
        others, key=lambda entry: hashlib.sha256(f"{window[0].id} {entry.id}".encode()).digest()
    )


def replay_parts(signals: Sequence[Signal], size: int) -> list[list[Signal]]:
    """As many parts of `size` as it takes for every signal to be in one; the last begins again where it falls short."""
    if len(signals) <= size or size == 0:
        return [list(signals[:size])]
    count = math.ceil(len(signals) / size)
    return [
        [signals[i % len(signals)] for i in range(at, at + size)]
        for at in range(0, count * size, size)
    ]


def limit_client_share(
    signals: Sequence[Signal], share: float, fewest: int = 0, limit: int | None = None
) -> tuple[list[Signal], int]:
    """The first `limit` of `signals` of which no client has more than `share` or `fewest`, and how many were beyond.

    A client keeps its first ones. A share that not even one signal of every client would keep is raised to that, and
    who is alone has no bound: somebody has to be learnt from.
    """
    owners = [
        signal.client or index for index, signal in enumerate(signals)
    ]  # nobody's: a client of its own
    counts = Counter(owners)
    limit = len(signals) if limit is None else limit
    if len(counts) < 2 or limit < 2:
        return list(signals[:limit]), 0
    share = max(share, 1 / min(limit, len(counts)))
    allowed = next(
        n
        for n in range(max(counts.values()), 0, -1)
        if n <= share * min(limit, _kept(counts, n)) + 1e-9
    )
    allowed = max(allowed, fewest)
    taken: Counter[str | int] = Counter()
    kept = []
    for owner, signal in zip(owners, signals, strict=True):
        taken[owner] += 1
        if taken[owner] <= allowed:
            kept.append(signal)
    return kept[:limit], len(signals) - len(kept)


def _kept(counts: "Counter[str | int]", each: int) -> int:
    return sum(min(count, each) for count in counts.values())
