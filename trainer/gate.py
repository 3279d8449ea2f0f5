"""The gate: is the candidate better than the active draft, on requests that neither was trained on here?

Pure: signals and two models in, a report out; randomness is a seed. `evaluate` marks a model, `decide` compares marks:
what simulates the gate calls the function that decides.

Legend: R requests.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from online.signals import Signal
from trainer.evaluation import Evaluation, Floats, evaluate

MIN_REQUESTS = 8  # fewer held-out requests prove nothing, whatever their interval says
RESAMPLES = 2000
# Of its intervals, which err on either side alike: an equal candidate passes in 4 % of cases. Most real ones gain.
LEVEL = 0.92
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
    """One kind of traffic, as the gate saw both drafts on it."""

    requests: int
    active_tokens_per_step: float
    candidate_tokens_per_step: float
    gain: float  # mean paired difference
    gain_low: float  # its bootstrap interval, of `LEVEL`; infinite where nothing can be said
    gain_high: float
    active_acceptance: float
    candidate_acceptance: float

    @classmethod
    def of(cls, compared: PairedEvaluation, seed: int) -> "Stratum":
        (active, candidate), gain_R = compared, compared.gain_R
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
    """What was found on the traffic that the candidate would serve, and the verdict."""

    promote: bool
    reason: str
    gamma: int
    earlier: Stratum  # traffic from before the window, which the candidate must not forget
    forgetting_tolerance: float

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: what is no finite number is None there."""
        found: dict[str, object] = json_ready(asdict(self))
        return found


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
    """Compares two drafts, request by request. `candidate` holds the weights exactly as they would be served."""

    def compared(signals: Sequence[Signal]) -> PairedEvaluation:
        marked = (evaluate(module, signals, gamma, pad_id) for module in (active, candidate))
        return PairedEvaluation(*(mean_by_request(marks, signals) for marks in marked))

    return decide(compared(new), compared(earlier), gamma=gamma, tolerance=tolerance, seed=seed)


def mean_by_request(marks: Evaluation, signals: Sequence[Signal]) -> Evaluation:
    """A request's n answers are one observation, not n: their means."""
    _, request_S = np.unique([signal.origin for signal in signals], return_inverse=True)
    answers_R = np.maximum(np.bincount(request_S), 1)
    return Evaluation(*(np.bincount(request_S, weights=marks_S) / answers_R for marks_S in marks))


def decide(
    new: PairedEvaluation,
    earlier: PairedEvaluation = NO_REQUESTS,
    *,
    gamma: int,
    tolerance: float = FORGETTING_TOLERANCE,
    seed: int = 0,
) -> GateReport:
    """Promotes what is proven better on new traffic and does not seem to have forgotten earlier traffic.

    Better is what has to be proven: the interval's lower bound is above zero. For the earlier traffic the mean itself
    is held against the tolerance. A bound would make the number of earlier requests decide: proof of no more than the
    tolerated loss would refuse half of the candidates that lose nothing where there are forty requests, and proof of
    a greater loss would let half of those pass that lose the tolerance and two standard errors more. By the mean both
    kinds of error are alike, and rare at a distance of the tolerance from it.
    """
    found, before = Stratum.of(new, seed), Stratum.of(earlier, seed)
    refusal = _refusal(found) or _forgetting(before, tolerance)
    said = f"{found.gain:+.3f} tokens per step ({LEVEL:.0%}: {found.interval}) on {found.requests} held-out requests"
    return GateReport(
        **asdict(found),
        promote=not refusal,
        reason=refusal or said,
        gamma=gamma,
        earlier=before,
        forgetting_tolerance=tolerance,
    )


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
    told = f"{earlier.gain:+.3f} tokens per step on {earlier.requests} earlier held-out requests"
    return f"forgets: {told}, where {-allowed:+.3f} is tolerated"


def bootstrap_interval(
    differences_R: Floats, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of the mean of paired differences, widened for few of them.

    Percentiles alone are too narrow there, as a normal interval with the sample's own deviation is: on real differences
    those of 95 % promoted up to 8 % of equal candidates by 8 requests. They are moved away from the mean by the same
    factor that turns such an interval into Student's.
    """
    count, tail = len(differences_R), (1 - level) / 2
    if count < 2 or not np.isfinite(differences_R).all():
        return float("-inf"), float("inf")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(differences_R[picks].mean(1), [100 * tail, 100 - 100 * tail])
    mean, wider = (
        differences_R.mean(),
        math.sqrt(count / (count - 1)) * _student_over_normal(1 - tail, count - 1),
    )
    return float(mean + wider * (low - mean)), float(mean + wider * (high - mean))


def _student_over_normal(share: float, freedom: int) -> float:
    """Of their quantiles; Student's by its expansion about the normal one, to 0.4 % from 7 degrees of freedom on."""
    z = NormalDist().inv_cdf(share)
    return 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def json_ready(told: Any) -> Any:
    """The same with None for what is no finite number: databases differ in what JSON they take."""
    if isinstance(told, dict):
        return {key: json_ready(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [json_ready(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told
