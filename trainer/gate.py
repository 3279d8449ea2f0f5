"""The gate: is the candidate better than the active draft, on requests that neither was trained on here?

Pure: signals and two models in, a report out; randomness is a seed. `evaluate` marks a model, `decide` compares marks:
what simulates the gate calls the function that decides.

Legend: N supervised positions, R requests.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from online.signals import Signal
from trainer.batches import Batch, Lesson, collate
from trainer.distill import draft_logits
from trainer.divergences import greedy_match, overlap

Floats = NDArray[np.float64]
MIN_REQUESTS = 8  # fewer held-out requests prove nothing, whatever their interval says
RESAMPLES = 2000
FORGETTING_TOLERANCE = 0.03  # of the active draft's tokens per step


class Marks(NamedTuple):
    """What a draft would have done, request by request."""

    tokens_R: Floats  # expected tokens per step
    acceptance_R: Floats  # mean acceptance probability


class Compared(NamedTuple):
    """Two drafts on the same requests."""

    active: Marks
    candidate: Marks

    @property
    def gain_R(self) -> Floats:
        return self.candidate.tokens_R - self.active.tokens_R


_NONE = Marks(np.zeros(0), np.zeros(0))
NOTHING = Compared(_NONE, _NONE)


@dataclass(frozen=True, slots=True)
class Stratum:
    """One kind of traffic, as the gate saw both drafts on it."""

    requests: int
    active_tokens_per_step: float
    candidate_tokens_per_step: float
    gain: float  # mean paired difference
    gain_low: float  # its bootstrap interval, 95 %; infinite where nothing can be said
    gain_high: float
    active_acceptance: float
    candidate_acceptance: float

    @classmethod
    def of(cls, compared: Compared, seed: int) -> "Stratum":
        (active, candidate), gain_R = compared, compared.gain_R
        low, high = bootstrap_interval(gain_R, seed)
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
        return _finite(asdict(self))


def judge(
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

    def compared(signals: Sequence[Signal]) -> Compared:
        return Compared(*(evaluate(module, signals, gamma, pad_id) for module in (active, candidate)))

    return decide(compared(new), compared(earlier), gamma=gamma, tolerance=tolerance, seed=seed)


def decide(
    new: Compared,
    earlier: Compared = NOTHING,
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
    said = f"{found.gain:+.3f} tokens per step (95 %: {found.interval}) on {found.requests} held-out requests"
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
        return f"worse: {new.gain:+.3f} tokens per step (95 %: {new.interval})"
    if new.gain_low <= 0:
        return f"{new.gain:+.3f} tokens per step, but the interval {new.interval} holds zero"
    return ""


def _forgetting(earlier: Stratum, tolerance: float) -> str:
    allowed = tolerance * earlier.active_tokens_per_step
    if earlier.requests < MIN_REQUESTS or earlier.gain >= -allowed:
        return ""
    told = f"{earlier.gain:+.3f} tokens per step on {earlier.requests} earlier held-out requests"
    return f"forgets: {told}, where {-allowed:+.3f} is tolerated"


def served_gamma(signals: Sequence[Signal], most: int) -> int:
    """The γ that drafts are compared at: what steps that drafted did draft, by the median request; `most` if none did.

    At the γ that a server may draft at most, differences are those of long runs that it hardly ever drafts: their noise
    hides a gain of 3 % from 200 requests.
    """
    drafted_R = [float(s.step_drafted[s.step_drafted > 0].mean()) for s in signals if s.step_drafted.any()]
    return min(most, max(1, round(float(np.median(drafted_R))))) if drafted_R else most


@torch.inference_mode()
def evaluate(module: nn.Module, signals: Sequence[Signal], gamma: int, pad_id: int, batch_signals: int = 16) -> Marks:
    """The marks of a draft that drafts γ tokens a step."""
    device = next(module.parameters()).device
    tokens: list[float] = []
    rates: list[float] = []
    for at in range(0, len(signals), batch_signals):
        batch = collate([Lesson.of(s) for s in signals[at : at + batch_signals]], pad_id, device)
        acceptance_N = acceptance(draft_logits(module, batch), batch).double().cpu().numpy()
        row_N = batch.row_N.cpu().numpy()
        for row in range(batch.ids_BT.shape[0]):
            own = acceptance_N[row_N == row]
            tokens.append(tokens_per_step(own, gamma))
            rates.append(float(own.mean()))
    return Marks(np.array(tokens), np.array(rates))


def acceptance(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Probability that a drafted token is kept [N]: agreement of first choices for greedy requests, else Σ min(p, q).

    Sampled requests are judged at temperature 1, where the logged distribution is exact.
    """
    greedy_N = (batch.temperature_B == 0)[batch.row_N]
    sampled_N = overlap(logits_NV, batch.truth)
    return torch.where(greedy_N, greedy_match(logits_NV, batch.truth), sampled_N)


def tokens_per_step(acceptance_T: Floats, gamma: int) -> float:
    """Expected tokens of a step with γ drafted tokens, over all positions where a step may begin.

    From position t it emits 1 + Σ_{i ≤ γ} Π_{j < i} α_{t+j} tokens: each further one needs all before it accepted.
    """
    total = np.ones(len(acceptance_T))
    reach = np.ones(len(acceptance_T))
    for i in range(gamma):
        shifted = np.concatenate([acceptance_T[i:], np.zeros(min(i, len(acceptance_T)))])
        reach = reach * shifted
        total += reach
    return float(total.mean())


def bootstrap_interval(differences_R: Floats, seed: int) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of paired differences, widened for few of them.

    Percentiles alone are too narrow there, as a normal interval with the sample's own deviation is: on real differences
    they promoted 7 % of equal candidates by 8 requests. They are moved away from the mean by the same factor that turns
    such an interval into Student's.
    """
    count = len(differences_R)
    if count < 2 or not np.isfinite(differences_R).all():
        return float("-inf"), float("inf")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(differences_R[picks].mean(1), [2.5, 97.5])
    mean, wider = differences_R.mean(), math.sqrt(count / (count - 1)) * _student(count - 1) / _NORMAL
    return float(mean + wider * (low - mean)), float(mean + wider * (high - mean))


_NORMAL = 1.959964  # the normal distribution's 97.5 % point


def _student(freedom: int) -> float:
    """Student's 97.5 % point: its expansion about the normal one, within 0.4 % from 7 degrees of freedom on."""
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _finite(told: dict[str, Any]) -> dict[str, Any]:
    finite: dict[str, Any] = {}
    for key, value in told.items():
        inner = _finite(value) if isinstance(value, dict) else value
        finite[key] = None if isinstance(value, float) and not np.isfinite(value) else inner
    return finite
