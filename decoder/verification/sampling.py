"""From logits to tokens. Pure functions; randomness comes in as uniforms in [0, 1).

Legend: B sequences, V vocabulary, … any axes between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLDEST = 1e-6  # temperature below which logits of 1e9 would overflow float32; they have long been one-hot


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sequences' sampling parameters. Which of them matter at all is known on the host: no device is asked."""

    divisor_B: Tensor  # temperature, as logits can bear it; 1 where greedy
    greedy_B: Tensor
    top_k_B: Tensor  # V: all
    top_p_B: Tensor  # 1: all
    all_greedy: bool
    any_greedy: bool
    any_truncated: bool

    @classmethod
    def of(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int],
        top_p: Sequence[float],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> "Sampling":
        top_k = [min(k, vocab_size) if k else vocab_size for k in top_k]
        return cls(
            torch.tensor([max(t, COLDEST) if t > 0 else 1.0 for t in temperature], device=device),
            torch.tensor([t == 0 for t in temperature], device=device),
            torch.tensor(top_k, device=device),
            torch.tensor(top_p, dtype=torch.float32, device=device),
            all_greedy=max(temperature) == 0,
            any_greedy=min(temperature) == 0,
            any_truncated=min(top_k) < vocab_size or min(top_p) < 1,
        )

    def select(self, members: list[int]) -> "Sampling":
        """The parameters of some of the sequences."""
        return Sampling(
            self.divisor_B[members],
            self.greedy_B[members],
            self.top_k_B[members],
            self.top_p_B[members],
            self.all_greedy,
            self.any_greedy,
            self.any_truncated,
        )


def probabilities(logits: Tensor, sampling: Sampling, out: Tensor | None = None) -> Tensor:
    """The distribution that is sampled from, [B, T, V]: temperature, then top-k, then top-p of what is left.

    Greedy sequences get all their mass on the first of the most likely tokens. Logits that are no numbers count as 0: any
    proposal is verified exactly, as long as it is a distribution. `out` may be a part of a larger tensor.
    """
    logits = at_least_float32(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    if (fused := compiled(logits)) is not None and not sampling.any_truncated:
        fused.probabilities(logits, sampling.divisor_B, sampling.greedy_B, out)
        return out
    logits = torch.nan_to_num(logits, nan=0.0, posinf=1e9, neginf=-torch.inf)
    probs = (logits / _along_rows(sampling.divisor_B, logits)).softmax(-1)
    if sampling.any_truncated:
        probs = _truncate(probs, sampling)
    if sampling.any_greedy:
        greedy = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(_along_rows(sampling.greedy_B, logits), greedy, probs)
    return out.copy_(probs)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits for all that look at them: what is below is dearer to read on a CPU, and too coarse to add up."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def most_likely(logits: Tensor) -> Tensor:
    """The first of the most likely tokens."""
    logits = at_least_float32(logits)
    best: Tensor = (
        logits.argmax(-1) if (fused := compiled(logits)) is None else fused.most_likely(logits)
    )
    return best


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per distribution by the inverse of its cumulative sum. `probs` [B, …, V], `uniform` [B, …]."""
    if (fused := compiled(probs)) is not None:
        drawn: Tensor = fused.sample(probs, uniform)
        return drawn
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    threshold = uniform.to(torch.float64)[..., None] * cumulative[..., -1:]
    # The first token whose cumulative mass exceeds the threshold has mass of its own: never one of probability 0.
    return (
        torch.searchsorted(cumulative, threshold, right=True)
        .squeeze(-1)
        .clamp_(max=probs.shape[-1] - 1)
    )


def _truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    ordered, index = probs.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered = torch.where(rank < _along_rows(sampling.top_k_B, probs), ordered, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < _along_rows(sampling.top_p_B, probs)) | (rank == 0)
    ordered = torch.where(kept, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))


def _along_rows(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *[1] * (like.ndim - 1))


def compiled(logits: Tensor) -> Any:
    """`decoder.verification.fused` for the logits that it serves, else None: torch's operations serve any."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        from decoder.verification import fused as vocabulary

        return vocabulary
    return None
