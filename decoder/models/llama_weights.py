"""The weights of a served Llama: reads them, and replaces them between two steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from decoder.models.linear import Linear

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Staged:
    """Weights that are laid out on the device and wait to be installed."""

    packed: list[Tensor]  # of the linears, in their order
    others: dict[str, Tensor]


class LlamaWeights:
    """All weights of a model: its linears, and the tensors that are read as they are.

    The latter are norms, the embedding, and the biases.
    """

    def __init__(self, state: Mapping[str, Tensor], linears: Sequence[Linear]) -> None:
        self._linears = list(linears)
        stacked = {"lm_head.weight"}  # tied, if no linear has it
        for linear in linears:
            stacked |= {*linear.names, *linear.biases}
        self._others = {name: state[name] for name in sorted(state.keys() - stacked)}
        self._others[EMBEDDING] = state[EMBEDDING]
        for linear in linears:
            self._others |= linear.biases
        self._device, self._dtype = state[EMBEDDING].device, state[EMBEDDING].dtype

    def read(self) -> dict[str, Tensor]:
        """The weights in use by Hugging Face names, tied ones once."""
        found: dict[str, Tensor] = {}
        for linear in self._linears:
            found |= linear.weights()
        return found | self._others

    def prepare(self, weights: Mapping[str, Tensor]) -> Staged:
        """Lays out new weights beside the live ones. Any thread may call it."""
        ready = {name: tensor.to(self._device, self._dtype) for name, tensor in weights.items()}
        packed = [linear.pack([ready[name] for name in linear.names]) for linear in self._linears]
        return Staged(packed, {name: ready[name] for name in self._others})

    def install(self, staged: Staged) -> bool:
        """Makes prepared weights live, between two steps. Returns whether the device holds them."""
        pairs = list(zip(self._linears, staged.packed, strict=True))
        for linear, packed in pairs:
            linear.install(packed)
        for name, tensor in staged.others.items():
            self._others[name].copy_(tensor)
        return all(linear.holds(packed) for linear, packed in pairs) and all(
            torch.equal(self._others[name], tensor) for name, tensor in staged.others.items()
        )
