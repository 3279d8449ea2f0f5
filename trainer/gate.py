"""The gate: is the candidate better than the active draft, on requests that trained neither?

Pure: signals and two models in, a report out; randomness is a seed.
`evaluate` measures a model, `decide` compares two evaluations. Simulations
of the gate call `decide`, too.

Legend: R requests · S answers (a request may have several).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from online.signals import Signal
from trainer.evaluation import Evaluation, evaluate
from trainer.intervals import Floats, bootstrap_interval

MIN_REQUESTS = 8  # fewer held-out requests prove nothing, whatever their interval
LEVEL = 0.92  # equal candidates pass in 4 % of cases; most real candidates gain
FORGETTING_TOLERANCE = 0.03  # of the active draft's tokens per step


class PairedEvaluation(NamedTuple):
    """Two drafts on the same requests."""

    active: Evaluation
    candidate: Evaluation

    @property
    def gain_R(self) -> Floats:
        return self.candidate.tokens_R - self.active.tokens_R


_EMPTY = Evaluation(np.zeros(0), np.zeros(0))
NO_REQUESTS = PairedEvaluation(_EMPTY, _EMPTY)


@dataclass(frozen=True, slots=True)
class Stratum:
    """Both drafts on one kind of traffic."""

    requests: int
    active_tokens_per_step: float
    candidate_tokens_per_step: float
    gain: float  # mean paired difference
    gain_low: float  # its interval at `LEVEL`; infinite without evidence
    gain_high: float
    active_acceptance: float
    candidate_acceptance: float

    @classmethod
    def of(cls, paired: PairedEvaluation, seed: int) -> "Stratum":
        (active, candidate), gain_R = paired, paired.gain_R
        low, high = bootstrap_interval(gain_R, seed, LEVEL)
        return cls(
            len(gain_R),
            _mean(active.tokens_R),
            _mean(candidate.tokens_R),
            _mean(gain_R),
            low,
            high,
            _mean(active.acceptance_R),
            _mean(candidate.acceptance_R),
        )

    @property
    def interval(self) -> str:
        return f"{self.gain_low:+.3f} to {self.gain_high:+.3f}"


@dataclass(frozen=True, slots=True)
class GateReport(Stratum):
    """The comparison on the traffic that the candidate would serve, and the decision."""

    promote: bool
    reason: str
    gamma: int
    earlier: Stratum  # traffic before the window, which the candidate must not forget
    forgetting_tolerance: float

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: numbers that are not finite become None."""
        report: dict[str, object] = json_ready(asdict(self))
        return report


def compare_drafts(
    active: nn.Module,
    candidate: nn.Module,
    new: Sequence[Signal],
    earlier: Sequence[Signal] = (),
    *,
    gamma: int,
    pad_id: int,
    tolerance: float = FORGETTING_TOLERANCE,
    seed: int = 0,
) -> GateReport:
    """Compares two drafts by request. `candidate` has the weights exactly as served."""

    def paired(signals: Sequence[Signal]) -> PairedEvaluation:
        evaluations = (evaluate(module, signals, gamma, pad_id) for module in (active, candidate))
        return PairedEvaluation(*(mean_by_request(one, signals) for one in evaluations))

    return decide(paired(new), paired(earlier), gamma=gamma, tolerance=tolerance, seed=seed)


def mean_by_request(evaluation: Evaluation, signals: Sequence[Signal]) -> Evaluation:
    """The means over each request's answers: n answers are one observation, not n."""
    _, request_S = np.unique([signal.origin for signal in signals], return_inverse=True)
    answers_R = np.maximum(np.bincount(request_S), 1)
    means = (np.bincount(request_S, weights=value_S) / answers_R for value_S in evaluation)
    return Evaluation(*means)


def decide(
    new: PairedEvaluation,
    earlier: PairedEvaluation = NO_REQUESTS,
    *,
    gamma: int,
    tolerance: float = FORGETTING_TOLERANCE,
    seed: int = 0,
) -> GateReport:
    """Promotes a candidate that is proven better on new traffic and keeps the earlier traffic.

    Better: the interval's lower bound is above zero. Kept: the mean loss on
    earlier traffic is within the tolerance. A bound there would let the
    number of earlier requests decide. Proof of a tolerable loss would
    refuse half of the candidates that lose nothing, at forty requests.
    Proof of a larger loss would pass half of those that lose two standard
    errors more than the tolerance. With the mean, both errors are alike,
    and rare at the tolerance's distance from it.
    """
    found, before = Stratum.of(new, seed), Stratum.of(earlier, seed)
    refusal = _refusal(found) or _forgetting(before, tolerance)
    return GateReport(
        **asdict(found),
        promote=not refusal,
        reason=refusal or _gain(found),
        gamma=gamma,
        earlier=before,
        forgetting_tolerance=tolerance,
    )


def _gain(new: Stratum) -> str:
    interval = f"({LEVEL:.0%}: {new.interval})"
    return f"{new.gain:+.3f} tokens per step {interval} on {new.requests} held-out requests"


def _refusal(new: Stratum) -> str:
    if new.requests < MIN_REQUESTS:
        return f"only {new.requests} held-out requests, {MIN_REQUESTS} are needed"
    if not np.isfinite(new.gain):
        return "the candidate's probabilities are no numbers"
    if new.gain_high < 0:
        return f"worse: {new.gain:+.3f} tokens per step ({LEVEL:.0%}: {new.interval})"
    if new.gain_low <= 0:
        return f"{new.gain:+.3f} tokens per step, but the interval {new.interval} holds zero"
    return ""


def _forgetting(earlier: Stratum, tolerance: float) -> str:
    allowed = tolerance * earlier.active_tokens_per_step
    if earlier.requests < MIN_REQUESTS or earlier.gain >= -allowed:
        return ""
    loss = f"{earlier.gain:+.3f} tokens per step on {earlier.requests} earlier held-out requests"
    return f"forgets: {loss}, where {-allowed:+.3f} is tolerated"


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def json_ready(value: Any) -> Any:
    """Replaces numbers that are not finite by None: not every database stores them in JSON."""
    if isinstance(value, dict):
        return {key: json_ready(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
