"""Lossy verification: accepts drafted tokens more often than exactness allows.

DistillSpec (arXiv 2310.08461). Token x at position i is accepted with probability
min(1, f(p_i(x)) / q_i(x)) in place of min(1, p_i(x) / q_i(x)), where f is p / ε, p / ε² or p^ε
with ε in (0, 1]. What follows a rejection is unchanged. A drafted position then emits x with

    e(x) = min(q(x), f(p(x))) + (1 − Σ min(q, f(p))) · norm(max(0, p − q))(x)

This equals p only for ε = 1. The distance from p is exactly the additional acceptance: f(p) ≥ p
adds mass only where q > p, while the residual has its mass where p > q. In total variation

    ½ Σ |e − p| = Σ min(q, f(p)) − Σ min(q, p) ≤ ½ Σ |p − q|

A token that the target rules out (p = 0, as by top-k) stays ruled out, because f(0) = 0.
A rejection needs q > f(p) ≥ p somewhere, so it always leaves a residual. Where f(p) ≥ q everywhere
nothing is rejected, and the output is the draft's.

Legend: B sequences, G tokens of a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from online.messages import Lenience

EXACT = 1.0, 1.0  # scale and power


@dataclass(frozen=True, slots=True)
class LenientAcceptance:
    """f(p) = scale · p^power by sequence, in float64 like the uniforms. Some may be exact."""

    scale_B: Tensor
    power_B: Tensor

    @classmethod
    def of(
        cls, asked: Sequence[Lenience | None], device: torch.device | str = "cpu"
    ) -> "LenientAcceptance | None":
        """None where all sequences are exact, which keeps their verification on its usual path."""
        factors = [EXACT if lenience is None else _factors(lenience) for lenience in asked]
        if all(each == EXACT for each in factors):
            return None
        scale_B, power_B = torch.tensor(factors, dtype=torch.float64).T.contiguous().to(device)
        return cls(scale_B, power_B)

    @property
    def exact_B(self) -> Tensor:
        return (self.scale_B == 1) & (self.power_B == 1)

    def select(self, members: list[int]) -> "LenientAcceptance":
        return LenientAcceptance(self.scale_B[members], self.power_B[members])

    def __call__(self, p_BG: Tensor) -> Tensor:
        # p^1 may differ from p by a bit, and exact sequences need p itself.
        p_BG, power_B1 = p_BG.double(), self.power_B[:, None]
        return self.scale_B[:, None] * torch.where(power_B1 == 1, p_BG, p_BG**power_B1)


def _factors(lenience: Lenience) -> tuple[float, float]:
    """Scale and power of the function. A product may overflow to infinity: all is accepted."""
    inverse = 1 / lenience.epsilon
    if lenience.function == "lin":
        return inverse, 1.0
    if lenience.function == "sq":
        return inverse * inverse, 1.0
    return 1.0, lenience.epsilon
