# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""Compiled operations on one distribution over the vocabulary.

Legend: V vocabulary, C columns, K top-k.
"""

from typing import Any

import numpy as np

from decoder.device.numba_support import EXACT, SUMS, exp, njit

LOWEST = np.float32(-np.inf)
UNDERFLOW = np.float32(-87)  # e^x below it counts as 0; float32 hardly holds it
CHUNK = 1024  # numbers that are summed in float32 at a time
LANES = 64  # numbers that are worked on side by side; one alone would wait for the one before


@njit(**EXACT)
def _at_least(x_C: Any, out_C: Any) -> None:
    for c in range(len(x_C)):
        out_C[c] = x_C[c] if x_C[c] > out_C[c] else out_C[c]


@njit(**EXACT)
def _column_maxima(x_V: Any, out_C: Any) -> None:
    """The largest of every C-th number."""
    C, V = len(out_C), len(x_V)
    whole = V // C * C
    for c in range(C):
        out_C[c] = LOWEST
    for first in range(0, whole, C):
        _at_least(x_V[first : first + C], out_C)
    _at_least(x_V[whole:], out_C)


@njit(**EXACT)
def maximum(x_V: Any) -> Any:
    lanes = np.empty(LANES, np.float32)
    _column_maxima(x_V, lanes)
    found = LOWEST
    for lane in lanes:
        found = lane if lane > found else found
    return found


@njit(**EXACT)
def argmax(x_V: Any) -> Any:
    """The first of the largest numbers, NaN excluded."""
    most = maximum(x_V)
    for v in range(len(x_V)):
        if x_V[v] == most:
            return v
    return 0


@njit(**EXACT)
def _clean(x_V: Any, out_V: Any) -> None:
    """NaN counts as 0, and infinity as 1e9."""
    for v in range(len(x_V)):
        number = x_V[v] if x_V[v] == x_V[v] else np.float32(0)
        out_V[v] = min(number, np.float32(1e9))


@njit(**SUMS)
def softmax(x_V: Any, divisor: Any, out_V: Any) -> None:
    """The softmax of x / divisor. `out_V` may be `x_V`."""
    _clean(x_V, out_V)
    most, factor, mass = maximum(out_V), np.float32(1) / divisor, 0.0
    for first in range(0, len(out_V), CHUNK):
        mass += _exponentiate(out_V[first : first + CHUNK], most, factor)
    factor = np.float32(1 / mass)
    for v in range(len(out_V)):
        out_V[v] *= factor


@njit(**SUMS)
def log_sum_exp(x_V: Any, most: Any) -> Any:
    """log Σ e^x, where `most` is the largest x."""
    mass, copy = 0.0, np.empty(CHUNK, np.float32)
    for first in range(0, len(x_V), CHUNK):
        chunk = x_V[first : first + CHUNK]
        for v in range(len(chunk)):
            copy[v] = chunk[v]
        mass += _exponentiate(copy[: len(chunk)], most, np.float32(1))
    return most + np.float32(np.log(mass))


@njit(**SUMS)
def _exponentiate(x_V: Any, most: Any, factor: Any) -> Any:
    """x ← e^(factor (x − most)); returns the sum.

    For few numbers at a time: in a long float32 sum the small ones would be lost.
    """
    mass = np.float32(0)
    for v in range(len(x_V)):
        below = (x_V[v] - most) * factor
        x_V[v] = exp(below) if below > UNDERFLOW else np.float32(0)
        mass += x_V[v]
    return mass


@njit(**SUMS)
def total(weights_V: Any) -> Any:
    """The sum, in float64."""
    mass = 0.0
    for weight in weights_V:
        mass += np.float64(weight)
    return mass


@njit(**SUMS)
def overlap(p_V: Any, q_V: Any) -> Any:
    """Σ min(p, q)."""
    mass = np.float32(0)
    for v in range(len(p_V)):
        mass += p_V[v] if p_V[v] < q_V[v] else q_V[v]
    return mass


@njit(**EXACT)
def sample_token(weights_V: Any, mass: Any, uniform: Any) -> Any:
    """The first token whose cumulative weight exceeds `uniform * mass`: it has weight itself."""
    threshold, before = uniform * mass, 0.0
    for first in range(0, len(weights_V), LANES):
        here = total(weights_V[first : first + LANES])
        if before + here > threshold:
            return first + _first_above(weights_V[first : first + LANES], threshold - before)
        before += here
    return _first_above(weights_V, np.inf)


@njit(**EXACT)
def _first_above(weights_V: Any, threshold: Any) -> Any:
    """As above, one by one. Where rounding lets no token exceed it: the last one with weight."""
    cumulative, last = 0.0, len(weights_V) - 1
    for v in range(len(weights_V)):
        if weights_V[v] > 0:
            cumulative, last = cumulative + np.float64(weights_V[v]), v
            if cumulative > threshold:
                break
    return last


@njit(**EXACT)
def top_k(x_V: Any, maxima_C: Any, columns_K: Any, values_K: Any, ids_K: Any) -> None:
    """The K largest numbers, in descending order, and their indices.

    They lie in the K columns with the largest maxima, and none is below the smallest of these.
    `maxima_C` and `columns_K` are scratch. Places without a number get -inf and index 0.
    """
    _column_maxima(x_V, maxima_C)
    held = 0
    for c in range(len(maxima_C)):
        held = _insert(values_K, columns_K, held, maxima_C[c], c)
    floor, held = values_K[-1], 0
    for k in range(len(columns_K)):
        for v in range(columns_K[k], len(x_V), len(maxima_C)):
            if x_V[v] >= floor:
                held = _insert(values_K, ids_K, held, x_V[v], v)
    for k in range(held, len(ids_K)):
        values_K[k], ids_K[k] = LOWEST, 0


@njit(**EXACT)
def _insert(values_K: Any, ids_K: Any, held: Any, value: Any, token: Any) -> Any:
    """Inserts into a list in descending order, and drops its smallest where it is full.

    Returns how many numbers it holds.
    """
    place = held
    if held == len(values_K):
        if not value > values_K[held - 1]:
            return held
        place -= 1
    while place > 0 and values_K[place - 1] < value:
        values_K[place], ids_K[place] = values_K[place - 1], ids_K[place - 1]
        place -= 1
    values_K[place], ids_K[place] = value, token
    return min(held + 1, len(values_K))
