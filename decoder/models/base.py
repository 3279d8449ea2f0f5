"""What a model is to the engine: one small interface over slot caches.

Legend: B sequences, T new tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from decoder.models.kv_cache import Slots, TreePositions


class LanguageModel(Protocol):
    """What the batch, the drafters and the enumeration test call. Tests have a tabular one."""

    vocab_size: int
    mask_id: int  # the token that holds a place in drafts that learnt to be asked so: padding, which no text has

    def forward(
        self,
        rows: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        nodes: TreePositions | None = None,
    ) -> Tensor:
        """Appends `ids_BT` to the sequences' contexts, sequence b from position `starts_B[b]` on, and returns logits [B, T, V].

        Whatever a sequence held from `starts_B[b]` on is replaced. `upto` is the longest context after the call (host-known,
        so that no device is asked for it). With `nodes` the new tokens are parts of trees that grow from `starts_B`
        on, forward by forward: each sees the context and its own ancestors.
        """
        ...

    def encode(self, rows: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        """Appends like `forward`, without logits: for prompts."""
        ...

    def gather(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """Of the tree that grew from `start` on, these nodes, one behind another, are now the slot's context."""
        ...

    def copy(self, source: int, destination: int, length: int) -> None:
        """Slot `destination` now holds the first `length` tokens of slot `source`."""
        ...


class ServedModel(LanguageModel, Protocol):
    """A model whose weights can be looked at, and replaced between two steps."""

    def weights(self) -> dict[str, Tensor]:
        """By Hugging Face names, tied ones once, as they are in use: what a safetensors file of the model holds."""
        ...

    def prepare(self, weights: Mapping[str, Tensor]) -> Any:
        """Lays other weights out on the device, beside the live ones. Any thread may call it."""
        ...

    def install(self, staged: Any) -> bool:
        """Puts what `prepare` returned in place, and says whether the device now holds it."""
        ...


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Cuts or pads the last axis: models that share a tokenizer may round their embeddings up differently."""
    missing = vocab_size - logits.shape[-1]
    return (
        logits if missing == 0 else torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    )
