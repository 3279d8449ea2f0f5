# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""Compiled residuals: what rejections leave of the target's distribution.

Legend: V vocabulary.
"""

from typing import Any

import numpy as np

from decoder.device.numba_support import EXACT, SUMS, njit
from decoder.verification.fused_vocabulary import total


@njit(**EXACT)
def copy(x_V: Any, out_V: Any) -> None:
    for v in range(len(out_V)):
        out_V[v] = x_V[v]


@njit(**EXACT)
def reject(p_V: Any, q_V: Any, scale: Any, rest_V: Any) -> None:
    """norm(max(0, p − scale q)).

    Without a residual p itself: only rounding can reject there. `rest_V` may be `p_V`.
    """
    mass = 0.0
    for v in range(len(p_V)):
        mass += np.float64(max(p_V[v] - scale * q_V[v], np.float32(0)))
    if mass > 0:
        factor = np.float32(1 / mass)
        for v in range(len(p_V)):
            rest_V[v] = factor * max(p_V[v] - scale * q_V[v], np.float32(0))
    else:
        copy(p_V, rest_V)


@njit(**EXACT)
def reject_chosen(p_V: Any, token: Any, rest_V: Any) -> None:
    """`reject` where q is one-hot."""
    mass = total(p_V[:token]) + total(p_V[token + 1 :])
    factor = np.float32(1 / mass) if mass > 0 else np.float32(1)
    for v in range(len(p_V)):
        rest_V[v] = factor * p_V[v] if v != token or mass == 0 else np.float32(0)


@njit(**SUMS)
def residual_mass(p_V: Any, q_V: Any, scale: Any) -> Any:
    mass = np.float32(0)
    for v in range(len(p_V)):
        rest = scale * p_V[v] - q_V[v]
        mass += rest if rest > 0 else np.float32(0)
    return np.float64(mass)
