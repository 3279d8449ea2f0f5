"""Lossy verification: drafted tokens that are kept more often than exactness allows (DistillSpec, arXiv 2310.08461).

Token x at position i is kept with probability min(1, f(p_i(x)) / q_i(x)) instead of min(1, p_i(x) / q_i(x)), where f is
p / ε, p / ε² or p^ε with ε in (0, 1]; what follows a rejection is unchanged. So a drafted position emits x with

    e(x) = min(q(x), f(p(x))) + (1 − Σ min(q, f(p))) · norm(max(0, p − q))(x)

This is p only for ε = 1. How far it is from p is exactly what is kept in addition: f(p) ≥ p, and it gains something
only where q > p, while the residual has its mass where p > q. In total variation

    ½ Σ |e − p| = Σ min(q, f(p)) − Σ min(q, p) ≤ ½ Σ |p − q|

A token that the target rules out (p = 0, as behind its top-k) stays ruled out, for f(0) = 0. A rejection needs
q > f(p) ≥ p somewhere, so it leaves a residual. Where f(p) ≥ q everywhere nothing is rejected, and the draft speaks.

Legend: B sequences, G drafted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from online.messages import Lenience

EXACT = 1.0, 1.0


@dataclass(frozen=True, slots=True)
class LenientAcceptance:
    """f(p) = scale · p^power, by sequence, of sequences some of which may be exact. In float64, as they meet uniforms."""

    scale_B: Tensor
    power_B: Tensor

    @classmethod
    def of(
        cls, asked: Sequence[Lenience | None], device: torch.device | str = "cpu"
    ) -> "LenientAcceptance | None":
        """None where all sequences are exact: a batch of them is verified as if there were no other."""
        factors = [EXACT if one is None else _factors(one) for one in asked]
        if all(each == EXACT for each in factors):
            return None
        scale_B, power_B = torch.tensor(factors, dtype=torch.float64).T.contiguous().to(device)
        return cls(scale_B, power_B)

    @property
    def exact_B(self) -> Tensor:
        return (self.scale_B == 1) & (self.power_B == 1)

    def select(self, rows: list[int]) -> "LenientAcceptance":
        return LenientAcceptance(self.scale_B[rows], self.power_B[rows])

    def __call__(self, p_BG: Tensor) -> Tensor:
        # p^1 may be off by a bit, and an exact sequence's p must not be.
        p_BG, power_B1 = p_BG.double(), self.power_B[:, None]
        return self.scale_B[:, None] * torch.where(power_B1 == 1, p_BG, p_BG**power_B1)


def _factors(lenience: Lenience) -> tuple[float, float]:
    inverse = 1 / lenience.epsilon
    # A product may overflow to infinity, which keeps what is possible at all; a power would raise an error.
    return {"lin": (inverse, 1.0), "sq": (inverse * inverse, 1.0), "exp": (1.0, lenience.epsilon)}[
        lenience.function
    ]
