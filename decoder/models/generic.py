"""Any causal LM that `transformers` runs, over slot caches: for families that have no forward of our own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from decoder.models.base import fit_vocabulary
from decoder.models.kv_cache import KVCache, Slots, TreePositions, slot_index
from decoder.models.ops import stands, visible


class GenericModel:
    """A `LanguageModel` whose forward is the module's own."""

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
        return fit_vocabulary(
            self._run(slots, ids_BT, starts_B, upto, tree, keep=0), self.vocab_size
        )

    @torch.inference_mode()
    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        self._run(slots, ids_BT, starts_B, upto, None, keep=1)

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
        keep: int,
    ) -> Tensor:
        ids_BT, starts_B = ids_BT.to(self.device), starts_B.to(self.device)
        capacity = self.cache.store.capacity
        upto = min(
            upto, capacity
        )  # sequences near their end draft along with others that go further
        # Padding of short sequences may point past the end: the last cell belongs to nobody.
        positions_BT, cells_BT = stands(starts_B, ids_BT.shape[1], capacity, tree)
        mask_B1TK = visible(starts_B, cells_BT, upto, tree)[:, None]
        self.cache.aim(slots, cells_BT, upto)
        logits_BTV: Tensor = self.module(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_B1TK,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits_BTV

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, tied ones once."""
        tied: Sequence[str] | dict[str, str] = (
            getattr(self.module, "all_tied_weights_keys", None) or ()
        )
        return {
            name: tensor for name, tensor in self.module.state_dict().items() if name not in tied
        }

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
    """A slot cache as `transformers` sees it. Its layers appear when the model first writes to them."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.store = KVCache(slots, capacity)
        self._rows: slice | Tensor = slice(0, 0)
        self._cells_N: Tensor | None = None
        self._upto = 0

    def aim(self, slots: Slots, cells_BT: Tensor, upto: int) -> None:
        """Says where the next forward writes, and that it reads the first `upto` cells."""
        slots_B = slot_index(slots, cells_BT.device)
        self._rows, self._upto = slots if isinstance(slots, slice) else slots_B, upto
        self._cells_N = (slots_B[:, None] * self.store.capacity + cells_BT).flatten()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes [B, K, T, D] in place; returns everything that the sequences may look at, [B, K, upto, D]."""
        assert self._cells_N is not None, "aim() comes before a forward"
        if layer_idx == len(self.store.keys):
            _, heads, _, size = key_states.shape
            self.store.grow(heads, size, key_states.dtype, key_states.device)
        new = [states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states)]
        self.store.write(layer_idx, self._cells_N, *new)
        return self.store.read(layer_idx, self._rows, self._upto)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._upto
