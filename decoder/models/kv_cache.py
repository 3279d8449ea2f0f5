"""Slot KV cache: every sequence owns a slot, and nothing is encoded twice.

The sequences of a batch occupy the first slots without holes, so that a forward reads a view of the
cache, not a copy. Positions beyond a sequence's length hold left-overs (padding, rejected drafts),
which are masked out until they are overwritten.

Legend: S slots, L capacity in tokens, K key-value heads, D head size, B sequences of a forward,
T new tokens of a sequence, M new tokens of all sequences, C nodes of a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Slots = slice | Sequence[int]


@dataclass(frozen=True, slots=True)
class TreePositions:
    """New tokens as nodes of trees that several forwards may build.

    A sequence's tree fills C cells from its start on, in order of arrival: the new tokens are the
    last of them. Cells before the start hold the context.
    """

    depth_BT: Tensor  # distance from the start, which is a token's position
    visible_BTC: Tensor  # which nodes of its tree a token attends to: its ancestors and itself

    @property
    def first(self) -> int:
        """Nodes that earlier forwards have added."""
        return self.visible_BTC.shape[2] - self.visible_BTC.shape[1]


class KVCache:
    """Keys and values of all layers, [S, L, K, D] each, at addresses that never change."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add_layer(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = self.slots, self.capacity, heads, size
        self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
        self.values.append(torch.zeros(shape, dtype=dtype, device=device))

    def write(self, layer: int, cells_M: Tensor, keys_MKD: Tensor, values_MKD: Tensor) -> None:
        """Writes in place. A token's cell is its slot times the capacity, plus its position."""
        self.keys[layer].flatten(0, 1).index_copy_(0, cells_M, keys_MKD)
        self.values[layer].flatten(0, 1).index_copy_(0, cells_M, values_MKD)

    def read(self, layer: int, slots: slice | Tensor, upto: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `upto` positions, [B, K, upto, D] each."""
        keys, values = self.keys[layer], self.values[layer]
        assert upto <= self.capacity, "the next cell belongs to another slot"
        if not isinstance(slots, slice):
            return keys[slots, :upto].transpose(1, 2), values[slots, :upto].transpose(1, 2)
        # A view in one operation: slicing and transposing would take three.
        _, L, K, D = keys.shape
        size, stride = (slots.stop - slots.start, K, upto, D), (L * K * D, D, K * D, 1)
        offset = slots.start * L * K * D
        return keys.as_strided(size, stride, offset), values.as_strided(size, stride, offset)

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """Moves the cells `start` + nodes, in ascending order, to `start` and the cells after."""
        if not self.keys:
            return
        cells = torch.tensor(nodes, device=self.keys[0].device) + start
        for tensor in (*self.keys, *self.values):
            tensor[slot, start : start + len(nodes)] = tensor[slot, cells]

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :length] = tensor[source, :length]


def slot_tensor(slots: Slots, device: torch.device) -> Tensor:
    """The sequences' slots, [B]."""
    if isinstance(slots, slice):
        return torch.arange(slots.start, slots.stop, device=device)
    return torch.tensor(slots, device=device)


def slot_at(slots: Slots, i: int) -> int:
    """The slot of the i-th sequence."""
    return slots.start + i if isinstance(slots, slice) else slots[i]
