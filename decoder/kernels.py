# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""The element-wise work of a Llama layer on a CPU, fused into four compiled functions.

A forward of a small model is hundreds of torch operations, and on a CPU calling one costs as much as what it computes.
Here numbers are read where torch has them and each token is worked off on one core, so that what a token gets does not
depend on who shares the batch. numba compiles the functions when a process loads its first model of a precision, in one
to three seconds.

Legend: N tokens and padding, E hidden size, M intermediate size, B rows, T new tokens, H query heads, K key-value
heads, G = H / K, D head size, S slots, L capacity.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from decoder.operations import Norms, Place, Rotations
from decoder.slots import Rows, SlotCache, slot_index

FEW = 64  # tokens (of a step, not of a prompt)
EXACT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
SUMS = EXACT | {"fastmath": {"reassoc", "contract"}}  # sums may be vectorised

_njit: Any = numba.njit
_intrinsic: Any = intrinsic


class FusedOperations:
    """`Operations` for float32 and bfloat16 on a CPU."""

    def __init__(self, rotations: Rotations, group: int) -> None:
        cos_LD, sin_LD = rotations
        self._capacity, half = len(cos_LD), cos_LD.shape[1] // 2
        self._cos, self._sin = cos_LD[:, :half].float().contiguous(), sin_LD[:, :half].float().contiguous()
        self._group, self._dtype = group, cos_LD.dtype
        self._place, self._add_norm, self._gate, self._turn = _compiled(self._dtype)
        self._scratch: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def place(self, rows: Rows, starts_B: Tensor, tokens: int, upto: int) -> Place:
        (B,) = starts_B.shape
        assert starts_B.dtype == torch.long, "kernels read numbers as they lie"
        where = rows if isinstance(rows, slice) else slot_index(rows, starts_B.device)
        first, slots_B = (where.start, None) if isinstance(where, slice) else (0, where)
        stands_2BT = torch.empty((2, B, tokens), dtype=torch.long)  # positions and cells
        bias = torch.empty((B, 1, self._group * tokens, upto), dtype=self._dtype) if B * tokens > 1 else None
        shape = B, tokens, self._group, upto, self._capacity
        self._place(_at(starts_B), _at(slots_B), first, _at(stands_2BT), _at(bias), *shape)
        return Place(where, tokens, upto, bias, (stands_2BT,))

    def add_norm(self, x_NE: Tensor, y_NE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        N, E = x_NE.shape
        out, out_at = self._room(N, (N, E))
        self._add_norm(_at(x_NE), _at(y_NE), _at(weight_E), out_at, N, E, eps)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        N, M = gate_up.shape[0], gate_up.shape[1] // 2
        out, out_at = self._room(N, (N, M))
        self._gate(_at(gate_up), out_at, N, M)
        return out

    def turn(self, qkv: Tensor, heads: int, place: Place, norms: Norms, cache: SlotCache, layer: int) -> Tensor:
        (stands,), keys, values = place.told, cache.keys[layer], cache.values[layer]
        (_, B, T), (K, D) = stands.shape, keys.shape[2:]
        out, out_at = self._room(B * T, (B, K, heads // K * T, D))
        head_norms = _at(norms.q), _at(norms.k), norms.eps
        tables, caches = (_at(self._cos), _at(self._sin)), (_at(keys), _at(values))
        self._turn(_at(qkv), _at(stands), *tables, *head_norms, *caches, out_at, B, T, heads, K, D)
        return out

    def _room(self, tokens: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """Room for a result, and its address. Where tokens are few it is the same one every time: an allocation costs
        more than what is computed, and every result is used up before the next one of its shape is asked for."""
        if (kept := self._scratch.get(shape)) is not None:
            return kept
        room = torch.empty(shape, dtype=self._dtype)
        if tokens <= FEW:
            self._scratch[shape] = room, room.data_ptr()
        return room, room.data_ptr()


def _at(tensor: Tensor | None) -> int:
    """Where its numbers lie; 0 for none."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), "kernels read tensors as they lie"
    return tensor.data_ptr()


def _pointer(kind: types.Type) -> Callable[[int], Any]:
    @_intrinsic
    def pointer(_: Any, address: Any) -> Any:
        signature = types.CPointer(kind)(types.int64)
        return signature, lambda context, builder, sig, args: builder.inttoptr(
            args[0], context.get_value_type(sig.return_type)
        )

    return pointer


_floats, _words, _integers = _pointer(types.float32), _pointer(types.uint16), _pointer(types.int64)


@_njit(inline="always")
def _from_bfloat16(word: Any) -> Any:
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@_njit(inline="always")
def _to_bfloat16(number: Any) -> Any:
    """Rounds to nearest even, as torch does."""
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded) if number == number else np.uint16(0x7FC0)


@_njit(inline="always")
def _same(number: Any) -> Any:
    return np.float32(number)


@_njit(inline="always")
def _exp(x: Any) -> Any:
    """e^x to 2e-7, in arithmetic that vectorises: e^x = 2^n e^r with |r| ≤ ln 2 / 2, and e^r as its series."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # ln 2 in two parts
    e = np.float32(1 / 5040)
    e = e * r + np.float32(1 / 720)
    e = e * r + np.float32(1 / 120)
    e = e * r + np.float32(1 / 24)
    e = e * r + np.float32(1 / 6)
    e = e * r + np.float32(1 / 2)
    e = e * r + np.float32(1)
    e = e * r + np.float32(1)
    return e * np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@cache
def _compiled(dtype: torch.dtype) -> tuple[Callable[..., None], ...]:
    """The four functions, for numbers that are stored as `dtype`; addresses come as integers."""
    narrow = dtype == torch.bfloat16
    array, load, store = (_words, _from_bfloat16, _to_bfloat16) if narrow else (_floats, _same, _same)
    address, count, real = types.int64, types.int64, types.float32

    @_njit(types.void(address, address, count, address, address, *[count] * 5), **EXACT)
    def place(
        starts_at: Any, slots_at: Any, first: Any, stands_at: Any, bias_at: Any, B: Any, T: Any, G: Any, U: Any, L: Any
    ) -> None:
        starts, slots = carray(_integers(starts_at), (B,)), carray(_integers(slots_at), (B,))
        stands, bias = carray(_integers(stands_at), (2, B, T)), carray(array(bias_at), (B, G, T, U))
        visible, hidden = store(np.float32(0)), store(np.float32(-np.inf))
        for b in range(B):
            slot = slots[b] if slots_at else first + b
            for t in range(T):
                position = min(starts[b] + t, L - 1)
                stands[0, b, t], stands[1, b, t] = position, slot * L + position
                if bias_at:
                    for g in range(G):
                        for u in range(U):
                            bias[b, g, t, u] = visible if u <= position else hidden

    @_njit(types.void(*[address] * 4, count, count, real), **SUMS)
    def add_norm(x_at: Any, y_at: Any, weight_at: Any, out_at: Any, N: Any, E: Any, eps: Any) -> None:
        x, y = carray(_floats(x_at), (N, E)), carray(array(y_at), (N, E))
        weight, out = carray(array(weight_at), (E,)), carray(array(out_at), (N, E))
        for n in range(N):
            if y_at:
                for e in range(E):
                    x[n, e] += load(y[n, e])
            total = np.float32(0)
            for e in range(E):
                total += x[n, e] * x[n, e]
            scale = np.float32(1) / np.sqrt(total / np.float32(E) + eps)
            for e in range(E):
                out[n, e] = store(load(store(x[n, e] * scale)) * load(weight[e]))

    @_njit(types.void(address, address, count, count), **EXACT)
    def gate(gate_up_at: Any, out_at: Any, N: Any, M: Any) -> None:
        gate_up, out = carray(array(gate_up_at), (N, 2, M)), carray(array(out_at), (N, M))
        for n in range(N):
            for m in range(M):
                x = load(gate_up[n, 0, m])
                silu = x / (np.float32(1) + _exp(-x))
                out[n, m] = store(load(store(silu)) * load(gate_up[n, 1, m]))

    @_njit(inline="always", **SUMS)
    def turn_head(head: Any, weight: Any, normed: Any, eps: Any, cos: Any, sin: Any, out: Any) -> None:
        half = len(cos)
        scale = np.float32(1)
        if normed:
            total = np.float32(0)
            for d in range(2 * half):
                total += load(head[d]) * load(head[d])
            scale /= np.sqrt(total / np.float32(2 * half) + eps)
            for d in range(2 * half):  # the projection is nobody else's: it may be written to
                head[d] = store(load(store(load(head[d]) * scale)) * load(weight[d]))
        for d in range(half):
            x, y = load(head[d]), load(head[half + d])
            out[d] = store(x * cos[d] - y * sin[d])
            out[half + d] = store(y * cos[d] + x * sin[d])

    @_njit(types.void(*[address] * 6, real, *[address] * 3, *[count] * 5), **SUMS)
    def turn(
        qkv_at: Any, stands_at: Any, cos_at: Any, sin_at: Any, q_norm_at: Any, k_norm_at: Any, eps: Any,
        keys_at: Any, values_at: Any, out_at: Any, B: Any, T: Any, H: Any, K: Any, D: Any,
    ) -> None:  # fmt: skip
        G, half, anywhere = H // K, D // 2, 1 << 40
        qkv = carray(array(qkv_at), (B, T, H + 2 * K, D))
        stands = carray(_integers(stands_at), (2, B, T))
        cos, sin = carray(_floats(cos_at), (anywhere, half)), carray(_floats(sin_at), (anywhere, half))
        q_norm, k_norm = carray(array(q_norm_at), (D,)), carray(array(k_norm_at), (D,))
        keys, values = carray(array(keys_at), (anywhere, K, D)), carray(array(values_at), (anywhere, K, D))
        out = carray(array(out_at), (B, K, G, T, D))
        for b in range(B):
            for t in range(T):
                position, cell = stands[0, b, t], stands[1, b, t]
                c, s = cos[position], sin[position]
                for h in range(H):
                    turn_head(qkv[b, t, h], q_norm, q_norm_at != 0, eps, c, s, out[b, h // G, h % G, t])
                for k in range(K):
                    turn_head(qkv[b, t, H + k], k_norm, k_norm_at != 0, eps, c, s, keys[cell, k])
                    for d in range(D):
                        values[cell, k, d] = qkv[b, t, H + K + k, d]

    return place, add_norm, gate, turn
