"""Slot KV cache: every sequence owns one slot, and nothing is encoded twice.

Legend: S slots, L capacity in tokens, H key-value heads, D head size, B rows of the present forward, T new tokens.

Rows are always the first slots, without holes: the engine moves the last slot into one that falls free. So the rows of
a forward are a view of the cache, not a copy. Positions behind a row's length hold left-overs (padding, rejected
drafts); they are masked out until they are overwritten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

Rows = slice | Sequence[int]


class SlotCache(Cache):
    """A `transformers` cache over fixed slots. Layers appear when the model first writes to them."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.capacity = capacity
        self._keys: list[Tensor] = []  # one [S, H, L, D] a layer
        self._values: list[Tensor] = []
        self._rows: Rows = slice(0, 0)
        self._write_at: tuple[Tensor, Tensor] | None = None
        self._upto = 0

    def aim(self, rows: Rows, positions_BT: Tensor, upto: int) -> None:
        """Says where the next forward writes, and that it reads the first `upto` positions."""
        index = list(range(rows.start, rows.stop)) if isinstance(rows, slice) else list(rows)
        rows_B1 = torch.tensor(index, device=positions_BT.device)[:, None]
        self._rows, self._write_at, self._upto = rows, (rows_B1, positions_BT), upto

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, H, T, D] in place; returns everything that the rows may look at, [B, H, upto, D]."""
        if layer_idx == len(self._keys):
            self._keys.append(self._empty(key_states))
            self._values.append(self._empty(value_states))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        assert self._write_at is not None, "aim() comes before a forward"
        rows_B1, positions_BT = self._write_at
        keys[rows_B1, :, positions_BT] = key_states.transpose(1, 2)
        values[rows_B1, :, positions_BT] = value_states.transpose(1, 2)
        rows = self._rows if isinstance(self._rows, slice) else rows_B1[:, 0]
        return keys[rows, :, : self._upto], values[rows, :, : self._upto]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        for tensor in (*self._keys, *self._values):
            tensor[destination, :, :length] = tensor[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._upto

    def _empty(self, states_BHTD: Tensor) -> Tensor:
        _, heads, _, size = states_BHTD.shape
        return torch.zeros((self.slots, heads, self.capacity, size), dtype=states_BHTD.dtype, device=states_BHTD.device)
