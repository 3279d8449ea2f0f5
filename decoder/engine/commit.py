"""Commit: sequences take the tokens that a step emits for them, and clients get them."""

import math
from collections.abc import Sequence

from decoder.recording.observation import Observation
from decoder.recording.trace import StepTrace
from decoder.sequence.plan import StepPlan
from decoder.sequence.sequence import LiveSequence
from decoder.verification.result import VerifiedSequence
from online.messages import TokenLogprob
from online.metrics import ServiceMetrics


def commit_tokens(
    plan: StepPlan,
    verified: Sequence[VerifiedSequence],
    observation: Observation | None,
    metrics: ServiceMetrics,
) -> int:
    """Extends all sequences of a step. Returns how many tokens they emitted."""
    drafted = plan.drafted
    emitted = 0
    for i, seq in enumerate(plan.seqs):
        emitted += _commit_sequence(seq, i, drafted[i], verified[i], observation)
    metrics.step(drafted, [each.accepted for each in verified], emitted)
    return emitted


def _commit_sequence(
    seq: LiveSequence,
    index: int,
    drafted: int,
    verified: VerifiedSequence,
    observation: Observation | None,
) -> int:
    start, version, new = seq.emitted, seq.draft.version, verified.emitted
    taken, text = seq.append(new)
    accepted_p = [math.nan] * verified.accepted  # known for the target's own draw only
    seq.emitted_p += [*accepted_p, verified.next_p][:taken]
    seq.cached = len(seq.tokens) - 1
    seq.draft_cached = min(seq.draft_cached, seq.cached)
    overlap, compared = verified.overlap, verified.compared
    seq.stats.add_step(drafted, verified.accepted, overlap, compared, taken, version)
    seq.acceptance.add(overlap, compared)
    if observation is not None and seq.trace is not None:
        step = StepTrace(observation, index, start, verified.accepted)
        seq.trace.steps.append(step)
    seq.deliver(text, new[:taken], _logprobs(seq, index, new[:taken], observation))
    return taken


def _logprobs(
    seq: LiveSequence, index: int, tokens: list[int], observation: Observation | None
) -> tuple[TokenLogprob, ...]:
    top = seq.query.logprobs
    if observation is None or top is None:
        return ()
    return tuple(
        observation.token_logprob(index, position, token, top)
        for position, token in enumerate(tokens)
    )
