"""The element-wise work of a Llama layer on a CPU, fused into four compiled kernels.

Legend: M tokens of one forward, flattened with padding; E hidden size, F intermediate size,
B sequences, T new tokens of a sequence, K key-value heads, A attention rows of a key-value head,
D head size.
"""

import torch
from torch import Tensor

from decoder.device.numba_support import STORED, at
from decoder.models import ops_cpu_kernels as kernels
from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_tensor
from decoder.models.ops import HeadNorms, Positions, Rotations

FEW = 64  # tokens of a step, not of a prompt


class FusedOperations:
    """`Operations` for float32 and bfloat16 on a CPU."""

    def __init__(self, rotations: Rotations, group: int) -> None:
        cos_LD, sin_LD = rotations
        self._capacity, half = len(cos_LD), cos_LD.shape[1] // 2
        self._cos_LD = cos_LD[:, :half].float().contiguous()
        self._sin_LD = sin_LD[:, :half].float().contiguous()
        self._group, self._dtype, self._like = group, cos_LD.dtype, STORED[cos_LD.dtype]
        self._buffers: dict[tuple[int, ...], tuple[Tensor, int]] = {}
        kernels.compile_kernels(self._dtype)

    def positions(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Positions:
        (B,), dtype = starts_B.shape, self._dtype
        read = slots if isinstance(slots, slice) else slot_tensor(slots, starts_B.device)
        first, slots_B = (read.start, None) if isinstance(read, slice) else (0, read)
        found_2BT = torch.empty((2, B, tokens), dtype=torch.long)
        bias_B1AU = depth_BT = visible_BTC = None
        nodes = 0
        if tree is not None:
            depth_BT, visible_BTC = tree.depth_BT.contiguous(), tree.visible_BTC.contiguous()
            nodes = visible_BTC.shape[2]
        if B * tokens > 1 or tree is not None:  # else a lone token, which sees all `upto` cells
            bias_B1AU = torch.empty((B, 1, self._group * tokens, upto), dtype=dtype)
        context = at(starts_B, torch.long), at(slots_B, torch.long), first
        shape = at(depth_BT, torch.long), at(visible_BTC, torch.bool)
        out = at(found_2BT, torch.long), at(bias_B1AU, dtype)
        sizes = B, tokens, self._group, upto, self._capacity, nodes
        kernels.positions(self._like, *context, *shape, *out, *sizes)
        return Positions(read, tokens, upto, bias_B1AU, (found_2BT,))

    def add_norm(self, x_ME: Tensor, y_ME: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        (M, E), dtype = x_ME.shape, self._dtype
        out, out_at = self._buffer(M, (M, E))
        summands = at(x_ME, torch.float32), at(y_ME, dtype)
        kernels.add_norm(self._like, *summands, at(weight_E, dtype), out_at, M, E, eps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        M, F = gate_up.shape[0], gate_up.shape[1] // 2
        out, out_at = self._buffer(M, (M, F))
        kernels.swiglu(self._like, at(gate_up, self._dtype), out_at, M, F)
        return out

    def rotate(
        self,
        qkv: Tensor,
        heads: int,
        positions: Positions,
        norms: HeadNorms,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        (found_2BT,), dtype = positions.tensors, self._dtype
        (_, B, T), (K, D) = found_2BT.shape, cache.keys[layer].shape[2:]
        out, out_at = self._buffer(B * T, (B, K, heads // K * T, D))
        tables = at(self._cos_LD, torch.float32), at(self._sin_LD, torch.float32)
        head_norms = at(norms.q, dtype), at(norms.k, dtype)
        cached = at(cache.keys[layer], dtype), at(cache.values[layer], dtype)
        sizes = B, T, heads, K, D
        read = at(qkv, dtype), at(found_2BT, torch.long), *tables, *head_norms
        kernels.rotate(self._like, *read, *cached, out_at, norms.eps, *sizes)
        return out

    def _buffer(self, tokens: int, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """A tensor for a result, and its address.

        For few tokens the same one every time, because an allocation takes longer than the
        arithmetic. Every result is used up before the next one of its shape is asked for.
        """
        if (known := self._buffers.get(shape)) is not None:
            return known
        buffer = torch.empty(shape, dtype=self._dtype)
        if tokens <= FEW:
            self._buffers[shape] = buffer, buffer.data_ptr()
        return buffer, buffer.data_ptr()
