"""From logits to tokens. Pure functions; randomness arrives as uniforms in [0, 1).

Legend: B sequences, N candidates of a sequence at most, V vocabulary, … any axes between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Colder logits of 1e9 would overflow float32; the distribution is one-hot long before.
COLDEST = 1e-6


@dataclass(frozen=True, slots=True)
class Uniforms:
    """The randomness of a verification, float64 in [0, 1)."""

    accept_BN: Tensor  # decides on each candidate
    emit_B: Tensor  # samples the emitted token

    def select(self, members: list[int]) -> "Uniforms":
        return Uniforms(self.accept_BN[members], self.emit_B[members])


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sequences' sampling parameters.

    The flags are known on the host, so that no device is asked whether a parameter matters.
    """

    divisor_B: Tensor  # the temperature, at least COLDEST; 1 for greedy sequences
    greedy_B: Tensor
    top_k_B: Tensor  # V: no limit
    top_p_B: Tensor  # 1: no limit
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


def runs_fused(logits: Tensor) -> bool:
    """Whether `decoder.verification.fused` serves these logits: float32 on a CPU.

    Callers import that module only then: importing it loads numba, which GPUs do not need.
    """
    return logits.device.type == "cpu" and logits.dtype == torch.float32


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits for everyone who reads them.

    Lower precision is slower to read on a CPU, and too coarse for sums over the vocabulary.
    """
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def probabilities(logits: Tensor, sampling: Sampling, out: Tensor | None = None) -> Tensor:
    """The distribution that is sampled from, [B, …, V]: temperature, then top-k, then top-p.

    Greedy sequences get a one-hot distribution on the first of their most likely tokens. NaN counts
    as 0, because verification is exact for any proposal that is a distribution. `out` may be a
    part of a larger tensor.
    """
    logits = at_least_float32(logits)
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if runs_fused(logits) and not sampling.any_truncated:
        from decoder.verification import fused

        fused.probabilities(logits, sampling.divisor_B, sampling.greedy_B, out)
        return out
    logits = torch.nan_to_num(logits, nan=0.0, posinf=1e9, neginf=-torch.inf)
    probs = (logits / _over_rows(sampling.divisor_B, logits)).softmax(-1)
    if sampling.any_truncated:
        probs = _truncate(probs, sampling)
    if sampling.any_greedy:
        one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        probs = torch.where(_over_rows(sampling.greedy_B, logits), one_hot, probs)
    return out.copy_(probs)


def most_likely(logits: Tensor) -> Tensor:
    """The first of the most likely tokens."""
    logits = at_least_float32(logits)
    if runs_fused(logits):
        from decoder.verification import fused

        return fused.most_likely(logits)
    return logits.argmax(-1)


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token per distribution, by the inverse of its cumulative sum.

    `probs` [B, …, V] need not be normalised; `uniform` [B, …].
    """
    if runs_fused(probs):
        from decoder.verification import fused

        return fused.sample(probs, uniform)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    threshold = uniform.to(torch.float64)[..., None] * cumulative[..., -1:]
    # The first token whose cumulative mass exceeds the threshold has mass of its own.
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp_(max=probs.shape[-1] - 1)


def _truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p of what is left."""
    ordered, index = probs.sort(stable=True, dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ordered = torch.where(rank < _over_rows(sampling.top_k_B, probs), ordered, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    before = ordered.cumsum(-1) - ordered
    inside = (before < _over_rows(sampling.top_p_B, probs)) | (rank == 0)
    ordered = torch.where(inside, ordered, 0.0)
    return torch.zeros_like(probs).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))


def _over_rows(values_B: Tensor, like: Tensor) -> Tensor:
    """One value per sequence, in a shape that broadcasts over `like`."""
    return values_B.view(-1, *[1] * (like.ndim - 1))
