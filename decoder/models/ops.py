"""The element-wise work of a Llama layer in torch's operations: the reference, and CUDA's.

`ops_cpu.py` has the same for CPUs, fused.

Legend: M tokens of one forward, flattened with padding; B sequences, T new tokens of a sequence,
U visible positions, E hidden size, H query heads, K key-value heads, A = T × H / K attention rows
of a key-value head, D head size, L capacity of a slot, C nodes of a tree.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_tensor

Rotations = tuple[Tensor, Tensor]  # cosines and sines by position, [L, D] each


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the tokens of a forward stand: the same for every layer."""

    slots: slice | Tensor
    tokens: int  # of each sequence
    upto: int  # cells of each slot that attention reads
    bias_B1AU: Tensor | None  # 0 where a token sees a position, -inf elsewhere; None: sees all
    tensors: tuple[Tensor, ...]  # positions and cells, as the implementation wants them


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """The weights of norms of query and key heads, which Qwen3 has."""

    q: Tensor | None
    k: Tensor | None
    eps: float


class Operations(Protocol):
    def positions(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Positions:
        """Positions of `tokens` new tokens a sequence from `starts_B` on, seeing `upto` cells.

        Padding of short sequences may point past the end of its slot. It is written to the last
        cell, which no context uses.
        """
        ...

    def add_norm(self, x_ME: Tensor, y_ME: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        """Adds y to the residual stream x in place; returns the RMS norm of x.

        x is float32, the result has the type of the weight.
        """
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """SiLU of the first half of the last axis times the second half."""
        ...

    def rotate(
        self,
        qkv: Tensor,
        heads: int,
        positions: Positions,
        norms: HeadNorms,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        """Rotates queries and keys to their positions; writes keys and values into the cache.

        `qkv` [M, (H + 2K) D] may be overwritten. Returns the queries [B, K, A, D]: the query heads
        that share a key-value head are further rows of one attention.
        """
        ...


class TorchOperations:
    def __init__(self, rotations: Rotations, group: int) -> None:
        cos_LD, sin_LD = rotations
        half = cos_LD.shape[1] // 2
        # The first half's sines are negated: see `_rotate`.
        self._cos_LD = cos_LD
        self._sin_LD = torch.cat([-sin_LD[:, :half], sin_LD[:, half:]], 1)
        self._group, self._capacity = group, len(cos_LD)

    def positions(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Positions:
        slots_B = slot_tensor(slots, starts_B.device)
        positions_BT, cells_BT = positions_and_cells(starts_B, tokens, self._capacity, tree)
        cells_M = (slots_B[:, None] * self._capacity + cells_BT).flatten()
        # A lone token needs a bias, too: a captured graph reads further than the context goes.
        visible_BAU = visible(starts_B, cells_BT, upto, tree).repeat(1, self._group, 1)
        bias = torch.zeros(visible_BAU.shape, dtype=self._cos_LD.dtype, device=starts_B.device)
        bias_B1AU = bias.masked_fill_(~visible_BAU, -torch.inf)[:, None]
        cos_BT1D = self._cos_LD[positions_BT][:, :, None]
        sin_BT1D = self._sin_LD[positions_BT][:, :, None]
        read = slots if isinstance(slots, slice) else slots_B
        return Positions(read, tokens, upto, bias_B1AU, (cells_M, cos_BT1D, sin_BT1D))

    def add_norm(self, x_ME: Tensor, y_ME: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        if y_ME is not None:
            x_ME += y_ME
        return _rms_norm(x_ME, weight_E, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    def rotate(
        self,
        qkv: Tensor,
        heads: int,
        positions: Positions,
        norms: HeadNorms,
        cache: KVCache,
        layer: int,
    ) -> Tensor:
        cells_M, cos_BT1D, sin_BT1D = positions.tensors
        (B, T), (K, D) = cos_BT1D.shape[:2], cache.keys[layer].shape[2:]
        qkv = qkv[: B * T].view(B, T, heads + 2 * K, D)
        qk_BTHD, v_BTKD = qkv[:, :, : heads + K], qkv[:, :, heads + K :]
        if norms.q is not None and norms.k is not None:
            q_BTHD = _rms_norm(qk_BTHD[:, :, :heads].float(), norms.q, norms.eps)
            k_BTKD = _rms_norm(qk_BTHD[:, :, heads:].float(), norms.k, norms.eps)
            qk_BTHD = torch.cat([q_BTHD, k_BTKD], 2)
        rotated = _rotate(qk_BTHD, cos_BT1D, sin_BT1D)
        q_BTHD, k_BTKD = rotated[:, :, :heads], rotated[:, :, heads:]
        cache.write(layer, cells_M, k_BTKD.flatten(0, 1), v_BTKD.flatten(0, 1))
        group = heads // K
        grouped = q_BTHD.reshape(B, T, K, group, D).permute(0, 2, 3, 1, 4)
        return grouped.reshape(B, K, group * T, D)


def positions_and_cells(
    starts_B: Tensor, tokens: int, capacity: int, tree: TreePositions | None
) -> tuple[Tensor, Tensor]:
    """The positions of new tokens, and their cells in their slots, [B, T] each."""
    steps_T = torch.arange(tokens, device=starts_B.device)
    if tree is None:
        cells_BT = (starts_B[:, None] + steps_T).clamp_(max=capacity - 1)
        return cells_BT, cells_BT
    cells_BT = (starts_B[:, None] + tree.first + steps_T).clamp_(max=capacity - 1)
    return (starts_B[:, None] + tree.depth_BT).clamp_(max=capacity - 1), cells_BT


def visible(starts_B: Tensor, cells_BT: Tensor, upto: int, tree: TreePositions | None) -> Tensor:
    """Which of the first `upto` cells of its slot a token attends to, [B, T, U]."""
    cells_U = torch.arange(upto, device=starts_B.device)
    if tree is None:
        return cells_U <= cells_BT[..., None]
    T, C = cells_BT.shape[1], tree.visible_BTC.shape[2]
    node_BU = cells_U - starts_B[:, None]  # negative: a cell of the context
    node_BTU = node_BU.clamp(0, C - 1)[:, None].expand(-1, T, -1)
    related_BTU = tree.visible_BTC.gather(2, node_BTU) & (node_BU < C)[:, None]
    return torch.where((node_BU < 0)[:, None], True, related_BTU)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last axis of `x` (float32), in the weight's precision."""
    return functional.rms_norm(x, x.shape[-1:], None, eps).to(weight.dtype) * weight


def _rotate(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the coordinates that rotate."""
    swapped_BTHD = x_BTHD.roll(x_BTHD.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHD * cos_BT1D, swapped_BTHD, sin_BT1D)


def operations(rotations: Rotations, group: int) -> Operations:
    """The operations for a device, with `group` query heads to a key-value head."""
    cos_LD, _ = rotations
    if cos_LD.device.type == "cpu" and cos_LD.dtype in (torch.float32, torch.bfloat16):
        # Imported here, because a GPU's process needs no compiler.
        from decoder.models.ops_cpu import FusedOperations

        return FusedOperations(rotations, group)
    return TorchOperations(rotations, group)
