"""A first draft for a target without one: some of its layers between its embeddings and head.

Direct Alignment (arXiv 2403.00858) pretrains a small draft from scratch, on
600 billion tokens. A target's own layers already read and write its
vocabulary; training then compensates for the missing layers.
"""

import copy
import re

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
BY_LAYER = ("layer_types",)  # lists with one entry a layer in configurations of the Llama family


def spread(wanted: int, there: int) -> list[int]:
    """`wanted` of `there` layers, evenly spread, with the first and the last.

    Raises:
        ValueError: there are fewer layers.
    """
    if not 1 <= wanted <= there:
        raise ValueError(f"layers: {wanted} of a target that has {there}")
    return [round(i * (there - 1) / max(1, wanted - 1)) for i in range(wanted)]


def thinned(target: nn.Module, kept: list[int]) -> nn.Module:
    """A copy of the target with the layers `kept` only, in that order.

    Raises:
        ValueError: its tensors are not named as in the Llama family.
    """
    whole: PreTrainedConfig = target.config  # type: ignore[assignment]
    config = copy.deepcopy(whole)
    config.num_hidden_layers = len(kept)
    for name in BY_LAYER:
        if listed := getattr(whole, name, None):
            setattr(config, name, [listed[layer] for layer in kept])
    dtype = next(target.parameters()).dtype
    made: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    there = target.state_dict()
    tensors = {name: there.get(_source(name, kept)) for name in made.state_dict()}
    missing = any(tensor is None for tensor in tensors.values())
    if missing or not any(map(LAYER.match, tensors)):
        name = type(target).__name__
        raise ValueError(f"{name}: its layers can't be told by the names of its tensors")
    made.load_state_dict(tensors)
    return made.eval()


def _source(name: str, kept: list[int]) -> str:
    """The target's name of a tensor of the thinned model."""
    return LAYER.sub(lambda found: f"{found[1]}{kept[int(found[2])]}{found[3]}", name)
