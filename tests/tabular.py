"""A language model that is a table: fixed random logits for every context.

Passes the contract tests of the real models.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from decoder.models.kv_cache import Slots, TreePositions


class TableModel:
    def __init__(
        self,
        vocab_size: int,
        seed: int,
        slots: int = 16,
        scale: float = 1.5,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.vocab_size, self.mask_id, self._dtype = vocab_size, 0, dtype
        self._seed, self._scale = seed, scale
        self._contexts: list[list[int]] = [[] for _ in range(slots)]
        self._drawn: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, context: Sequence[int]) -> np.ndarray:
        """[V], float64, of the table's precision; the same for the same context, always."""
        tokens = tuple(context)
        if tokens not in self._drawn:
            self._drawn[tokens] = self._draw(tokens)
        return self._drawn[tokens].copy()

    def _draw(self, tokens: tuple[int, ...]) -> np.ndarray:
        key = zlib.crc32(repr((self._seed, list(tokens))).encode())
        drawn = np.random.default_rng(key).normal(0, self._scale, self.vocab_size)
        if self._dtype == torch.float32:
            return drawn.astype(np.float32).astype(np.float64)
        return drawn

    def forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        members = range(slots.start, slots.stop) if isinstance(slots, slice) else slots
        if tree is not None:
            return self._extend_trees(members, ids_BT, starts_B, tree)
        out = []
        for slot, ids, start in zip(members, ids_BT.tolist(), starts_B.tolist(), strict=True):
            context = self._contexts[slot][:start]
            assert len(context) == start, "a sequence's context has a gap"
            self._contexts[slot] = [*context, *ids]
            out.append([self.logits([*context, *ids[: t + 1]]) for t in range(len(ids))])
        return torch.from_numpy(np.array(out)).to(self._dtype)

    def _extend_trees(
        self, slots: Sequence[int], ids_BT: Tensor, starts_B: Tensor, tree: TreePositions
    ) -> Tensor:
        out = []
        for b, (slot, ids, start) in enumerate(
            zip(slots, ids_BT.tolist(), starts_B.tolist(), strict=True)
        ):
            self._contexts[slot] = held = [*self._contexts[slot][: start + tree.first], *ids]
            assert len(held) == start + tree.first + len(ids), "a sequence's tree has a gap"
            out.append([])
            for t, among in enumerate(tree.visible_BTC[b].tolist()):
                ancestors = [held[start + c] for c, seen in enumerate(among) if seen]
                assert len(ancestors) == tree.depth_BT[b, t] + 1, (
                    "a node's position is the number of its ancestors"
                )
                out[-1].append(self.logits([*held[:start], *ancestors]))
        return torch.from_numpy(np.array(out)).to(self._dtype)

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        held = self._contexts[slot]
        self._contexts[slot] = [*held[:start], *(held[start + node] for node in nodes)]

    def context(self, slot: int) -> list[int]:
        return self._contexts[slot]

    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self.forward(slots, ids_BT, starts_B, upto)

    def copy(self, source: int, destination: int, length: int) -> None:
        self._contexts[destination] = self._contexts[source][:length]
