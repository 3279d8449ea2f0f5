"""The gate: is the candidate better than the active draft, on requests that neither was trained on here?

Pure: signals and two models in, a report out; randomness is a seed.

Legend: N supervised positions, R requests.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

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


@dataclass(frozen=True, slots=True)
class GateReport:
    promote: bool
    reason: str
    requests: int
    active_tokens_per_step: float
    candidate_tokens_per_step: float
    gain: float  # mean paired difference
    gain_low: float  # its bootstrap interval, 95 %; infinite where nothing can be said
    gain_high: float
    active_acceptance: float
    candidate_acceptance: float
    gamma: int

    def as_dict(self) -> dict[str, object]:
        """JSON-ready: what is no finite number is None there."""
        unsafe = {
            key: value for key, value in asdict(self).items() if isinstance(value, float) and not np.isfinite(value)
        }
        return {**asdict(self), **dict.fromkeys(unsafe)}


def judge(
    active: nn.Module,
    candidate: nn.Module,
    signals: Sequence[Signal],
    *,
    gamma: int,
    pad_id: int,
    seed: int = 0,
    batch_signals: int = 16,
) -> GateReport:
    """Compares two drafts, request by request. `candidate` holds the weights exactly as they would be served."""
    old, old_rate = evaluate(active, signals, gamma, pad_id, batch_signals)
    new, new_rate = evaluate(candidate, signals, gamma, pad_id, batch_signals)
    low, high = bootstrap_interval(new - old, seed)
    gain = float((new - old).mean()) if len(signals) else 0.0
    if len(signals) < MIN_REQUESTS:
        promote, reason = False, f"only {len(signals)} held-out requests, {MIN_REQUESTS} are needed"
    elif not np.isfinite(gain):
        promote, reason = False, "the candidate's probabilities are no numbers"
    elif low > 0:
        promote, reason = (
            True,
            f"{gain:+.3f} tokens per step (95 %: {low:+.3f} to {high:+.3f}) on {len(signals)} held-out requests",
        )
    else:
        promote, reason = False, f"{gain:+.3f} tokens per step, but the interval {low:+.3f} to {high:+.3f} holds zero"
        if high < 0:
            reason = f"worse: {gain:+.3f} tokens per step (95 %: {low:+.3f} to {high:+.3f})"
    return GateReport(
        promote,
        reason,
        len(signals),
        _mean(old),
        _mean(new),
        gain,
        low,
        high,
        _mean(old_rate),
        _mean(new_rate),
        gamma,
    )


@torch.inference_mode()
def evaluate(
    module: nn.Module, signals: Sequence[Signal], gamma: int, pad_id: int, batch_signals: int = 16
) -> tuple[Floats, Floats]:
    """Per request: expected tokens per step, and mean acceptance probability."""
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
    return np.array(tokens), np.array(rates)


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
    """The 95 % percentile interval of the mean of paired differences."""
    if len(differences_R) < 2 or not np.isfinite(differences_R).all():
        return float("-inf"), float("inf")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(differences_R), (RESAMPLES, len(differences_R)))
    low, high = np.percentile(differences_R[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0
