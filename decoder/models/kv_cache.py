"""Slot KV cache: every sequence owns one slot, and nothing is encoded twice.

Legend: S slots, L capacity in tokens, K key-value heads, D head size, B sequences of the present forward, T new tokens.

Sequences are the first slots, without holes, so that the sequences of a forward are a view of the cache, not a copy. Positions
behind a sequence's length hold left-overs (padding, rejected drafts); they are masked out until they are overwritten.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Slots = slice | Sequence[int]


@dataclass(frozen=True, slots=True)
class TreePositions:
    """New tokens that are nodes of trees: each stands behind its own ancestors, and lies where there is room.

    A sequence's nodes lie in the cells from its start on, C of them so far, the forward's own last; the cells before its
    start are a context as ever.
    """

    depth_BT: Tensor  # how far behind the start a token stands
    visible_BTC: Tensor  # which of the sequence's nodes it may look at: its ancestors and itself

    @property
    def first(self) -> int:
        """Cells that earlier forwards have filled."""
        return self.visible_BTC.shape[2] - self.visible_BTC.shape[1]


class KVCache:
    """Keys and values of all layers, [S, L, K, D] each, at addresses that never change."""

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def grow(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Adds a layer."""
        for side in (self.keys, self.values):
            side.append(
                torch.zeros((self.slots, self.capacity, heads, size), dtype=dtype, device=device)
            )

    def write(self, layer: int, cells_N: Tensor, keys_NKD: Tensor, values_NKD: Tensor) -> None:
        """Writes in place. `cells_N`: slot times capacity plus position, of every new token."""
        self.keys[layer].flatten(0, 1).index_copy_(0, cells_N, keys_NKD)
        self.values[layer].flatten(0, 1).index_copy_(0, cells_N, values_NKD)

    def read(self, layer: int, slots: slice | Tensor, upto: int) -> tuple[Tensor, Tensor]:
        """What the sequences may look at, [B, K, upto, D] each."""
        keys, values = self.keys[layer], self.values[layer]
        assert upto <= self.capacity, "what lies behind is another slot"
        if isinstance(slots, slice):  # a view, by one operation
            _, _, K, D = keys.shape
            size, stride = (
                (slots.stop - slots.start, K, upto, D),
                (self.capacity * K * D, D, K * D, 1),
            )
            offset = slots.start * self.capacity * K * D
            return keys.as_strided(size, stride, offset), values.as_strided(size, stride, offset)
        return keys[slots, :upto].transpose(1, 2), values[slots, :upto].transpose(1, 2)

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """What lies in the cells `start` + nodes, ascending, now lies in those from `start` on."""
        cells = torch.tensor(nodes, device=self.keys[0].device) + start if self.keys else None
        for tensor in (*self.keys, *self.values):
            tensor[slot, start : start + len(nodes)] = tensor[slot, cells]

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :length] = tensor[source, :length]


def slot_index(slots: Slots, device: torch.device) -> Tensor:
    """The sequences' slots, [B]."""
    if isinstance(slots, slice):
        return torch.arange(slots.start, slots.stop, device=device)
    return torch.tensor(slots, device=device)


def slot_at(slots: Slots, i: int) -> int:
    return slots.start + i if isinstance(slots, slice) else slots[i]
