"""A first draft for a target that has none: some of its own layers between its own embeddings and head.

Direct Alignment (arXiv 2403.00858) pretrains a small draft from nothing, on 600 billion tokens. A target's own layers
already read and write its vocabulary; what is learnt afterwards is to do without those that were left out.
"""

import copy
import re

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
BY_LAYER = ("layer_types",)  # what configurations of the Llama family list per layer


def spread(wanted: int, there: int) -> list[int]:
    """`wanted` of `there` layers, evenly spread; the first and the last first of all.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= wanted <= there:
        raise ValueError(f"layers: {wanted} of a target that has {there}")
    return [round(i * (there - 1) / max(1, wanted - 1)) for i in range(wanted)]


def thinned(target: nn.Module, kept: list[int]) -> nn.Module:
    """A model of the target's family and width with copies of the layers `kept`, in that order, and of all the rest.

    Raises:
        ValueError: its tensors are not named as the Llama family names them.
    """
    whole: PreTrainedConfig = target.config  # type: ignore[assignment]
    config = copy.deepcopy(whole)
    config.num_hidden_layers = len(kept)
    for name in BY_LAYER:
        if listed := getattr(whole, name, None):
            setattr(config, name, [listed[layer] for layer in kept])
    dtype = next(target.parameters()).dtype
    made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    there = target.state_dict()
    tensors = {name: there.get(_source(name, kept)) for name in made.state_dict()}
    if not any(LAYER.match(name) for name in tensors) or any(
        tensor is None for tensor in tensors.values()
    ):
        raise ValueError(
            f"{type(target).__name__}: its layers can't be told by the names of its tensors"
        )
    made.load_state_dict(tensors)
    return made.eval()


def _source(name: str, kept: list[int]) -> str:
    """The target's name of what a thinned model calls `name`."""
    return LAYER.sub(lambda found: f"{found[1]}{kept[int(found[2])]}{found[3]}", name)
