# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""Compiled kernels of a Llama layer on a CPU, for numbers stored as float32 or bfloat16.

Every kernel's first argument is an example of a stored number: its type selects the precision.
A token is computed on one core, so its result does not depend on the rest of the batch.

Legend: M tokens of one forward, flattened with padding; E hidden size, F intermediate size,
B sequences, T new tokens of a sequence, U visible positions, H query heads, K key-value heads,
R = H / K, D head size, S slots, L capacity, C nodes of a tree.
"""

from typing import Any

import numpy as np
import torch
from numba import carray, typeof, types

from decoder.device.numba_support import (
    EXACT,
    STORED,
    SUMS,
    bools,
    elements,
    exp,
    floats,
    integers,
    load,
    njit,
    store,
)

ANYWHERE = 1 << 40  # a first axis whose length the kernel does not know


def compile_kernels(dtype: torch.dtype) -> None:
    """Compiles the kernels for one precision, or loads them from the disk cache."""
    address = count = types.int64
    stored, real = typeof(STORED[dtype]), types.float64
    positions.compile((stored, *[address] * 2, count, *[address] * 4, *[count] * 6))
    add_norm.compile((stored, *[address] * 4, count, count, real))
    swiglu.compile((stored, *[address] * 2, count, count))
    rotate.compile((stored, *[address] * 9, real, *[count] * 5))


@njit(**EXACT)
def positions(
    like: Any, starts_at: Any, slots_at: Any, first_slot: Any, depth_at: Any, visible_at: Any,
    positions_at: Any, bias_at: Any, B: Any, T: Any, R: Any, U: Any, L: Any, C: Any,
) -> None:  # fmt: skip
    """Writes each token's position and cell, and the attention bias. C = 0: no trees."""
    starts, slots = carray(integers(starts_at), (B,)), carray(integers(slots_at), (B,))
    depth, visible = carray(integers(depth_at), (B, T)), carray(bools(visible_at), (B, T, C))
    found = carray(integers(positions_at), (2, B, T))
    bias = carray(elements(like, bias_at), (B, R, T, U))
    shown, hidden = store(np.float32(0), like), store(np.float32(-np.inf), like)
    is_tree = C > 0
    for b in range(B):
        slot, start = slots[b] if slots_at else first_slot + b, starts[b]
        for t in range(T):
            cell = min(start + t + (C - T if is_tree else 0), L - 1)
            found[0, b, t] = min(start + depth[b, t], L - 1) if is_tree else cell
            found[1, b, t] = slot * L + cell
            if bias_at:
                for r in range(R):
                    for u in range(U):
                        node = u - start if is_tree else -1
                        seen = u <= cell if node < 0 else node < C and visible[b, t, node]
                        bias[b, r, t, u] = shown if seen else hidden


@njit(**SUMS)
def add_norm(
    like: Any, x_at: Any, y_at: Any, weight_at: Any, out_at: Any, M: Any, E: Any, eps: Any
) -> None:
    """x ← x + y in float32, out ← RMS norm of x."""
    x, y = carray(floats(x_at), (M, E)), carray(elements(like, y_at), (M, E))
    weight = carray(elements(like, weight_at), (E,))
    out = carray(elements(like, out_at), (M, E))
    epsilon = np.float32(eps)
    for m in range(M):
        if y_at:
            for e in range(E):
                x[m, e] += load(y[m, e])
        total = np.float32(0)
        for e in range(E):
            total += x[m, e] * x[m, e]
        scale = np.float32(1) / np.sqrt(total / np.float32(E) + epsilon)
        for e in range(E):
            out[m, e] = store(load(store(x[m, e] * scale, like)) * load(weight[e]), like)


@njit(**EXACT)
def swiglu(like: Any, gate_up_at: Any, out_at: Any, M: Any, F: Any) -> None:
    """out ← SiLU(gate) · up."""
    gate_up = carray(elements(like, gate_up_at), (M, 2, F))
    out = carray(elements(like, out_at), (M, F))
    for m in range(M):
        for f in range(F):
            x = load(gate_up[m, 0, f])
            silu = x / (np.float32(1) + exp(-x))
            out[m, f] = store(load(store(silu, like)) * load(gate_up[m, 1, f]), like)


@njit(**SUMS)
def rotate(
    like: Any, qkv_at: Any, positions_at: Any, cos_at: Any, sin_at: Any, q_norm_at: Any,
    k_norm_at: Any, keys_at: Any, values_at: Any, out_at: Any, eps: Any,
    B: Any, T: Any, H: Any, K: Any, D: Any,
) -> None:  # fmt: skip
    """Norms and rotates queries into `out`, keys into the cache; copies values into the cache."""
    R, half = H // K, D // 2
    qkv = carray(elements(like, qkv_at), (B, T, H + 2 * K, D))
    found = carray(integers(positions_at), (2, B, T))
    cos, sin = carray(floats(cos_at), (ANYWHERE, half)), carray(floats(sin_at), (ANYWHERE, half))
    q_norm = carray(elements(like, q_norm_at), (D,))
    k_norm = carray(elements(like, k_norm_at), (D,))
    keys = carray(elements(like, keys_at), (ANYWHERE, K, D))
    values = carray(elements(like, values_at), (ANYWHERE, K, D))
    out = carray(elements(like, out_at), (B, K, R, T, D))
    epsilon = np.float32(eps)
    for b in range(B):
        for t in range(T):
            position, cell = found[0, b, t], found[1, b, t]
            c, s = cos[position], sin[position]
            for h in range(H):
                if q_norm_at:
                    _norm_head(like, qkv[b, t, h], q_norm, epsilon)
                _rotate_head(like, qkv[b, t, h], c, s, out[b, h // R, h % R, t])
            for k in range(K):
                if k_norm_at:
                    _norm_head(like, qkv[b, t, H + k], k_norm, epsilon)
                _rotate_head(like, qkv[b, t, H + k], c, s, keys[cell, k])
                for d in range(D):
                    values[cell, k, d] = qkv[b, t, H + K + k, d]


@njit(inline="always", **SUMS)
def _norm_head(like: Any, head: Any, weight: Any, epsilon: Any) -> None:
    """The RMS norm of one head, in place: nobody else reads the projection."""
    total = np.float32(0)
    for d in range(len(head)):
        total += load(head[d]) * load(head[d])
    scale = np.float32(1) / np.sqrt(total / np.float32(len(head)) + epsilon)
    for d in range(len(head)):
        head[d] = store(load(store(load(head[d]) * scale, like)) * load(weight[d]), like)


@njit(inline="always", **SUMS)
def _rotate_head(like: Any, head: Any, cos: Any, sin: Any, out: Any) -> None:
    """The two halves of a head are the coordinates that rotate."""
    half = len(cos)
    for d in range(half):
        x, y = load(head[d]), load(head[half + d])
        out[d] = store(x * cos[d] - y * sin[d], like)
        out[half + d] = store(y * cos[d] + x * sin[d], like)
