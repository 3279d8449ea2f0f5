"""The element-wise work of a Llama layer, as torch has it: the reference, and what runs on CUDA.

`decoder/models/ops_cpu.py` has the same for CPUs, fused. Legend as in `decoder/models/llama.py`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_index

Rotations = tuple[Tensor, Tensor]  # cosines and sines by position, [L, D] each


@dataclass(frozen=True, slots=True)
class Place:
    """Where a forward's tokens stand: the same for every layer."""

    slots: slice | Tensor
    tokens: int  # of each sequence
    upto: int
    bias_B1QU: (
        Tensor | None
    )  # Q = G × T: 0 where a position is visible, -inf where not; None: all are
    told: tuple[Tensor, ...]  # what the operations tell themselves of positions and cells


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms of query and key heads, which Qwen3 has."""

    q: Tensor | None
    k: Tensor | None
    eps: float


class Operations(Protocol):
    def place(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Place:
        """Where a forward of this many tokens a sequence stands, from `starts_B` on, in sight of the first `upto` cells.

        Padding of short sequences may point past the end: the last cell belongs to nobody.
        """
        ...

    def add_norm(self, x_NE: Tensor, y_NE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        """Adds y to the residual stream x (float32) in place; returns the norm of x in the type of the weight."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """SiLU of the first half of the last axis times the second."""
        ...

    def turn(
        self, qkv: Tensor, heads: int, place: Place, norms: Norms, cache: KVCache, layer: int
    ) -> Tensor:
        """Rotates queries and keys to their positions, and writes keys and values into the cache.

        `qkv` [N, (H + 2K) D] may be written to. Returns the queries, [B, K, Q, D]: those of the query heads that share
        a key-value head are further positions of one attention.
        """
        ...


class TorchOperations:
    def __init__(self, rotations: Rotations, group: int) -> None:
        cos_LD, sin_LD = rotations
        half = cos_LD.shape[1] // 2
        # The first half's sines are negated: see `_rotate`.
        self._cos, self._sin = cos_LD, torch.cat([-sin_LD[:, :half], sin_LD[:, half:]], 1)
        self._group, self._capacity = group, len(cos_LD)

    def place(
        self,
        slots: Slots,
        starts_B: Tensor,
        tokens: int,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Place:
        capacity = self._capacity
        slots_B = slot_index(slots, starts_B.device)
        positions_BT, cells_BT = stands(starts_B, tokens, capacity, tree)
        cells_N = (slots_B[:, None] * capacity + cells_BT).flatten()
        # Even a lone token needs it: a captured graph looks further than the context goes.
        visible_BTU = visible(starts_B, cells_BT, upto, tree).repeat(1, self._group, 1)
        bias = torch.zeros(visible_BTU.shape, dtype=self._cos.dtype, device=starts_B.device)
        bias = bias.masked_fill_(~visible_BTU, -torch.inf)[:, None]
        turns = self._cos[positions_BT][:, :, None], self._sin[positions_BT][:, :, None]
        return Place(
            slots if isinstance(slots, slice) else slots_B, tokens, upto, bias, (cells_N, *turns)
        )

    def add_norm(self, x_NE: Tensor, y_NE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        if y_NE is not None:
            x_NE += y_NE
        return _rms_norm(x_NE, weight_E, eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def turn(
        self, qkv: Tensor, heads: int, place: Place, norms: Norms, cache: KVCache, layer: int
    ) -> Tensor:
        cells_N, cos_BT1D, sin_BT1D = place.told
        (B, T), (K, D) = cos_BT1D.shape[:2], cache.keys[layer].shape[2:]
        qkv = qkv[: B * T].view(B, T, heads + 2 * K, D)
        turned, v = qkv[:, :, : heads + K], qkv[:, :, heads + K :]
        if norms.q is not None and norms.k is not None:
            q, k = turned[:, :, :heads].float(), turned[:, :, heads:].float()
            turned = torch.cat(
                [_rms_norm(q, norms.q, norms.eps), _rms_norm(k, norms.k, norms.eps)], 2
            )
        turned = _rotate(turned, cos_BT1D, sin_BT1D)
        q, k = turned[:, :, :heads], turned[:, :, heads:]
        cache.write(layer, cells_N, k.flatten(0, 1), v.flatten(0, 1))
        return (
            q.reshape(B, T, K, heads // K, D)
            .permute(0, 2, 3, 1, 4)
            .reshape(B, K, heads // K * T, D)
        )


def stands(
    starts_B: Tensor, tokens: int, capacity: int, tree: TreePositions | None
) -> tuple[Tensor, Tensor]:
    """Positions of a forward's tokens and the cells of their slots, [B, T] each."""
    steps_T = torch.arange(tokens, device=starts_B.device)
    if tree is None:
        cells_BT = (starts_B[:, None] + steps_T).clamp_(max=capacity - 1)
        return cells_BT, cells_BT
    cells_BT = (starts_B[:, None] + tree.first + steps_T).clamp_(max=capacity - 1)
    return (starts_B[:, None] + tree.depth_BT).clamp_(max=capacity - 1), cells_BT


def visible(starts_B: Tensor, cells_BT: Tensor, upto: int, tree: TreePositions | None) -> Tensor:
    """Which of the first `upto` cells of its slot a token may look at, [B, T, U]."""
    cells_U = torch.arange(upto, device=starts_B.device)
    if tree is None:
        return cells_U <= cells_BT[..., None]
    behind_BU = cells_U - starts_B[:, None]
    node_BTU = behind_BU.clamp(0, tree.visible_BTC.shape[2] - 1)[:, None].expand(
        -1, cells_BT.shape[1], -1
    )
    among_BTU = (
        tree.visible_BTC.gather(2, node_BTU) & (behind_BU < tree.visible_BTC.shape[2])[:, None]
    )
    return torch.where((behind_BU < 0)[:, None], True, among_BTU)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last axis of `x` (float32), in the weight's precision."""
    return F.rms_norm(x, x.shape[-1:], None, eps).to(weight.dtype) * weight


def _rotate(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the coordinates that turn."""
    swapped = x_BTHD.roll(x_BTHD.shape[-1] // 2, -1)
    return torch.addcmul(x_BTHD * cos_BT1D, swapped, sin_BT1D)


def operations(rotations: Rotations, group: int) -> Operations:
    """What a Llama does between its products, `group` query heads to a key-value head."""
    cos_LD, _ = rotations
    if cos_LD.device.type == "cpu" and cos_LD.dtype in (torch.float32, torch.bfloat16):
        from decoder.models.ops_cpu import (
            FusedOperations,
        )  # a GPU's process has no use for a compiler

        return FusedOperations(rotations, group)
    return TorchOperations(rotations, group)
