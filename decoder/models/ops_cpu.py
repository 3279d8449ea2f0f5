# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-any-return,attr-defined"
"""The element-wise work of a Llama layer on a CPU, fused into four compiled functions.

Here numbers are read where torch has them and each token is worked off on one core, so that what a token gets does not
depend on who shares the batch.

Legend: N tokens and padding, E hidden size, M intermediate size, B sequences, T new tokens, H query heads, K key-value
heads, G = H / K, D head size, S slots, L capacity.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from decoder.device.numba_support import (
    EXACT,
    SUMS,
    at,
    bools,
    exp,
    floats,
    from_bfloat16,
    integers,
    njit,
    same,
    to_bfloat16,
    words,
)
from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_index
from decoder.models.ops import Norms, Place, Rotations

FEW = 64  # tokens (of a step, not of a prompt)


class FusedOperations:
    """`Operations` for float32 and bfloat16 on a CPU."""

    def __init__(self, rotations: Rotations, group: int) -> None:
        cos_LD, sin_LD = rotations
        self._capacity, half = len(cos_LD), cos_LD.shape[1] // 2
        self._cos, self._sin = (
            cos_LD[:, :half].float().contiguous(),
            sin_LD[:, :half].float().contiguous(),
        )
        self._group, self._dtype = group, cos_LD.dtype
        self._place, self._add_norm, self._gate, self._turn = _compiled(self._dtype)
        self._scratch: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def place(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Place:
        (B,) = starts_B.shape
        assert starts_B.dtype == torch.long, "kernels read numbers as they lie"
        where = slots if isinstance(slots, slice) else slot_index(slots, starts_B.device)
        first, slots_B = (where.start, None) if isinstance(where, slice) else (0, where)
        stands_2BT = torch.empty((2, B, tokens), dtype=torch.long)  # positions and cells
        several = (
            B * tokens > 1 or tree is not None
        )  # a lone token is the last of `upto`: it sees all of them
        bias = (
            torch.empty((B, 1, self._group * tokens, upto), dtype=self._dtype) if several else None
        )
        depth_BT = visible_BTC = None
        if tree is not None:
            depth_BT, visible_BTC = tree.depth_BT.contiguous(), tree.visible_BTC.contiguous()
        shape = (
            B,
            tokens,
            self._group,
            upto,
            self._capacity,
            0 if visible_BTC is None else visible_BTC.shape[2],
        )
        told = at(starts_B), at(slots_B), first, at(depth_BT), at(visible_BTC)
        self._place(*told, at(stands_2BT), at(bias), *shape)
        return Place(where, tokens, upto, bias, (stands_2BT,))

    def add_norm(self, x_NE: Tensor, y_NE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        N, E = x_NE.shape
        out, out_at = self._room(N, (N, E))
        self._add_norm(at(x_NE), at(y_NE), at(weight_E), out_at, N, E, eps)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        N, M = gate_up.shape[0], gate_up.shape[1] // 2
        out, out_at = self._room(N, (N, M))
        self._gate(at(gate_up), out_at, N, M)
        return out

    def turn(
        self, qkv: Tensor, heads: int, place: Place, norms: Norms, cache: KVCache, layer: int
    ) -> Tensor:
        (stands,), keys, values = place.told, cache.keys[layer], cache.values[layer]
        (_, B, T), (K, D) = stands.shape, keys.shape[2:]
        out, out_at = self._room(B * T, (B, K, heads // K * T, D))
        head_norms = at(norms.q), at(norms.k), norms.eps
        tables, caches = (at(self._cos), at(self._sin)), (at(keys), at(values))
        self._turn(at(qkv), at(stands), *tables, *head_norms, *caches, out_at, B, T, heads, K, D)
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


@cache
def _compiled(dtype: torch.dtype) -> tuple[Callable[..., None], ...]:
    """The four functions, for numbers that are stored as `dtype`; addresses come as integers."""
    narrow = dtype == torch.bfloat16
    array, load, store = (words, from_bfloat16, to_bfloat16) if narrow else (floats, same, same)
    address, count, real = types.int64, types.int64, types.float32

    @njit(types.void(address, address, count, *[address] * 4, *[count] * 6), **EXACT)
    def place(
        starts_at: Any, slots_at: Any, first: Any, depth_at: Any, visible_at: Any, stands_at: Any, bias_at: Any,
        B: Any, T: Any, G: Any, U: Any, L: Any, C: Any,
    ) -> None:  # fmt: skip
        starts, slots = carray(integers(starts_at), (B,)), carray(integers(slots_at), (B,))
        depth, among = carray(integers(depth_at), (B, T)), carray(bools(visible_at), (B, T, C))
        stands, bias = carray(integers(stands_at), (2, B, T)), carray(array(bias_at), (B, G, T, U))
        visible, hidden, tree = store(np.float32(0)), store(np.float32(-np.inf)), C > 0
        for b in range(B):
            slot, start = slots[b] if slots_at else first + b, starts[b]
            for t in range(T):
                cell = min(start + t + (C - T if tree else 0), L - 1)
                stands[0, b, t] = min(start + depth[b, t], L - 1) if tree else cell
                stands[1, b, t] = slot * L + cell
                if bias_at:
                    for g in range(G):
                        for u in range(U):
                            node = u - start if tree else -1
                            seen = u <= cell if node < 0 else node < C and among[b, t, node]
                            bias[b, g, t, u] = visible if seen else hidden

    @njit(types.void(*[address] * 4, count, count, real), **SUMS)
    def add_norm(
        x_at: Any, y_at: Any, weight_at: Any, out_at: Any, N: Any, E: Any, eps: Any
    ) -> None:
        x, y = carray(floats(x_at), (N, E)), carray(array(y_at), (N, E))
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

    @njit(types.void(address, address, count, count), **EXACT)
    def gate(gate_up_at: Any, out_at: Any, N: Any, M: Any) -> None:
        gate_up, out = carray(array(gate_up_at), (N, 2, M)), carray(array(out_at), (N, M))
        for n in range(N):
            for m in range(M):
                x = load(gate_up[n, 0, m])
                silu = x / (np.float32(1) + exp(-x))
                out[n, m] = store(load(store(silu)) * load(gate_up[n, 1, m]))

    @njit(inline="always", **SUMS)
    def turn_head(
        head: Any, weight: Any, normed: Any, eps: Any, cos: Any, sin: Any, out: Any
    ) -> None:
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

    @njit(types.void(*[address] * 6, real, *[address] * 3, *[count] * 5), **SUMS)
    def turn(
        qkv_at: Any, stands_at: Any, cos_at: Any, sin_at: Any, q_norm_at: Any, k_norm_at: Any, eps: Any,
        keys_at: Any, values_at: Any, out_at: Any, B: Any, T: Any, H: Any, K: Any, D: Any,
    ) -> None:  # fmt: skip
        G, half, anywhere = H // K, D // 2, 1 << 40
        qkv = carray(array(qkv_at), (B, T, H + 2 * K, D))
        stands = carray(integers(stands_at), (2, B, T))
        cos, sin = (
            carray(floats(cos_at), (anywhere, half)),
            carray(floats(sin_at), (anywhere, half)),
        )
        q_norm, k_norm = carray(array(q_norm_at), (D,)), carray(array(k_norm_at), (D,))
        keys, values = (
            carray(array(keys_at), (anywhere, K, D)),
            carray(array(values_at), (anywhere, K, D)),
        )
        out = carray(array(out_at), (B, K, G, T, D))
        for b in range(B):
            for t in range(T):
                position, cell = stands[0, b, t], stands[1, b, t]
                c, s = cos[position], sin[position]
                for h in range(H):
                    turn_head(
                        qkv[b, t, h], q_norm, q_norm_at != 0, eps, c, s, out[b, h // G, h % G, t]
                    )
                for k in range(K):
                    turn_head(qkv[b, t, H + k], k_norm, k_norm_at != 0, eps, c, s, keys[cell, k])
                    for d in range(D):
                        values[cell, k, d] = qkv[b, t, H + K + k, d]

    return place, add_norm, gate, turn
