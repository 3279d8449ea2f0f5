"""Any causal LM that `transformers` runs, over slot caches: for families without our own forward.

Legend: B sequences, T new tokens of a sequence, M new tokens of all sequences, U visible positions,
K key-value heads, D head size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from decoder.models.base import fit_vocabulary
from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_tensor
from decoder.models.ops import positions_and_cells, visible


class GenericModel:
    """A `ServedModel` whose forward is the module's own."""

    def __init__(self, module: nn.Module, cache: "GenericCache", vocab_size: int) -> None:
        self.module, self.cache, self.vocab_size = module, cache, vocab_size
        self.mask_id = int(module.config.pad_token_id or 0)  # type: ignore[union-attr, arg-type]
        self.device = next(module.parameters()).device

    @torch.inference_mode()
    def forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        logits_BTV = self._run(slots, ids_BT, starts_B, upto, tree, logits_to_keep=0)
        return fit_vocabulary(logits_BTV, self.vocab_size)

    @torch.inference_mode()
    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self._run(slots, ids_BT, starts_B, upto, None, logits_to_keep=1)

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        self.cache.store.keep_path(slot, start, nodes)

    def copy(self, source: int, destination: int, length: int) -> None:
        self.cache.store.copy(source, destination, length)

    def _run(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None,
        logits_to_keep: int,
    ) -> Tensor:
        """Logits of the last `logits_to_keep` tokens of each sequence; 0: of all."""
        ids_BT, starts_B = ids_BT.to(self.device), starts_B.to(self.device)
        capacity = self.cache.store.capacity
        # Sequences near their end draft along with others, beyond the capacity.
        upto = min(upto, capacity)
        # Padding of short sequences may point past the end: no context uses the last cell.
        positions_BT, cells_BT = positions_and_cells(starts_B, ids_BT.shape[1], capacity, tree)
        mask_B1TU = visible(starts_B, cells_BT, upto, tree)[:, None]
        self.cache.begin(slots, cells_BT, upto)
        logits_BTV: Tensor = self.module(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_B1TU,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits
        return logits_BTV

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, tied ones once."""
        tied = set(getattr(self.module, "all_tied_weights_keys", None) or ())
        state = self.module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in tied}

    def prepare(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        live = self.weights()
        return {
            name: tensor.to(live[name].device, live[name].dtype) for name, tensor in weights.items()
        }

    def install(self, staged: Mapping[str, Tensor]) -> bool:
        live = self.weights()
        for name, tensor in staged.items():
            live[name].copy_(tensor)
        return all(torch.equal(live[name], tensor) for name, tensor in staged.items())


class GenericCache(Cache):
    """A slot cache behind the interface of `transformers`. The first forward adds its layers."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.store = KVCache(slots, capacity)
        self._slots: slice | Tensor = slice(0, 0)
        self._cells_M: Tensor | None = None
        self._upto = 0

    def begin(self, slots: Slots, cells_BT: Tensor, upto: int) -> None:
        """Sets where the next forward writes; it reads the first `upto` cells."""
        slots_B = slot_tensor(slots, cells_BT.device)
        self._slots = slots if isinstance(slots, slice) else slots_B
        self._upto = upto
        self._cells_M = (slots_B[:, None] * self.store.capacity + cells_BT).flatten()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, K, T, D] in place; returns all that sequences may attend to, [B, K, U, D]."""
        assert self._cells_M is not None, "begin() comes before a forward"
        if layer_idx == len(self.store.keys):
            _, heads, _, size = key_states.shape
            self.store.add_layer(heads, size, key_states.dtype, key_states.device)
        keys_MKD = key_states.transpose(1, 2).flatten(0, 1)
        values_MKD = value_states.transpose(1, 2).flatten(0, 1)
        self.store.write(layer_idx, self._cells_M, keys_MKD, values_MKD)
        return self.store.read(layer_idx, self._slots, self._upto)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._upto
