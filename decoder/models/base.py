"""The interfaces between the decoder and its models.

Legend: B sequences, T new tokens of a sequence, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from decoder.models.hidden import HiddenStates
from decoder.models.kv_cache import Slots, TreePositions


class LanguageModel(Protocol):
    """A causal LM over a slot KV cache. Tests implement it with a table of logits."""

    vocab_size: int
    mask_id: int  # the padding token: drafts trained on masks predict behind it, no text has it

    def forward(
        self,
        slots: Slots,
        ids_BT: Tensor,
        starts_B: Tensor,
        upto: int,
        tree: TreePositions | None = None,
    ) -> Tensor:
        """Appends tokens to the sequences' contexts and returns their logits, [B, T, V].

        Sequence b continues at position `starts_B[b]`; cached tokens from there on are replaced.
        `upto` is the longest context after the call, known on the host without asking the device.
        With `tree` the new tokens are nodes of trees rooted at `starts_B`, and several calls may
        build one tree: a node sees the context, its ancestors and itself.
        """
        ...

    def encode(self, slots: Slots, ids_BT: Tensor, starts_B: Tensor, upto: int) -> None:
        """Appends prompt tokens like `forward`, but computes no logits."""
        ...

    def keep_path(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """Moves these nodes of the tree at `start` together: they continue the slot's context."""
        ...

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` tokens of slot `source` to slot `destination`."""
        ...


@runtime_checkable
class LayeredModel(LanguageModel, Protocol):
    """A language model that can stop after any of its layers: what early exit needs."""

    num_layers: int

    def embed(self, ids_BT: Tensor) -> HiddenStates:
        """The tokens before the first layer."""
        ...

    def run_layer(
        self, slots: Slots, hidden: HiddenStates, starts_B: Tensor, upto: int, layer: int
    ) -> HiddenStates:
        """Runs one layer over tokens that have passed all layers before it.

        `starts_B` and `upto` are those of `forward`. Consumes `hidden`.
        """
        ...

    def exit_logits(self, hidden: HiddenStates) -> Tensor:
        """The final norm and the head, whatever layer the tokens have reached: [B, T, V]."""
        ...


class ServedModel(LanguageModel, Protocol):
    """A language model whose weights can be read, and replaced between two steps."""

    def weights(self) -> dict[str, Tensor]:
        """The weights in use by Hugging Face names, tied ones once."""
        ...

    def prepare(self, weights: Mapping[str, Tensor]) -> Any:
        """Lays out new weights beside the live ones. Any thread may call it."""
        ...

    def install(self, staged: Any) -> bool:
        """Makes the result of `prepare` live. Returns whether the device now holds it."""
        ...


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Cuts or pads the last axis to `vocab_size`.

    Models that share a tokenizer may round the size of their embeddings up differently.
    """
    missing = vocab_size - logits.shape[-1]
    if missing == 0:
        return logits
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
