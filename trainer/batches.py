"""From examples to tensors: padded batches with the target's distributions.

Legend: B sequences · T tokens (emitted, of branches, and masks) · P
supervised positions of the batch · K top-k.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.signals import Signal
from trainer.examples import Example, Ints
from trainer.recipe import Recipe
from trainer.truncated import Truncated

MAX_LOGITS = 2**27  # half a GiB of float32, and a few times that with gradients


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    ids_BT: Tensor
    position_BT: Tensor
    # [B, T]: 1 for a token. With branches [B, 1, T, T]: the tokens that each token sees.
    mask: Tensor
    sequence_P: Tensor
    column_P: Tensor
    kind_P: Tensor
    target: Truncated
    temperature_B: Tensor


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str) -> TrainingBatch:
    """One padded batch."""
    length = max(len(example.ids_T) for example in examples)
    ids_BT = np.full((len(examples), length), pad_id, np.int64)
    position_BT = np.zeros_like(ids_BT)
    for b, example in enumerate(examples):
        ids_BT[b, : len(example.ids_T)] = example.ids_T
        position_BT[b, : len(example.ids_T)] = example.position_T
    counts = [len(example.column_P) for example in examples]
    temperatures = [example.signal.temperature for example in examples]
    return TrainingBatch(
        torch.from_numpy(ids_BT).to(device),
        torch.from_numpy(position_BT).to(device),
        _mask(examples, length).to(device),
        torch.from_numpy(np.repeat(np.arange(len(examples)), counts)).to(device),
        _joined([example.column_P for example in examples], device),
        _joined([example.kind_P for example in examples], device),
        _target(examples, device),
        torch.tensor(temperatures, device=device),
    )


def _joined(arrays: Sequence[NDArray[np.generic]], device: torch.device | str) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)


def _target(examples: Sequence[Example], device: torch.device | str) -> Truncated:
    """The logged distributions, cut to the smallest K in the batch."""
    k = min(example.signal.top_ids.shape[1] for example in examples)
    ids, logp, rest = [], [], []
    for example in examples:
        signal, at_P = example.signal, example.verified_P
        ids.append(signal.top_ids[at_P, :k].astype(np.int64))
        logp.append(signal.top_logp[at_P, :k].astype(np.float32))
        rest.append(_rest(signal, at_P, k))
    return Truncated(_joined(ids, device), _joined(logp, device), _joined(rest, device))


def _rest(signal: Signal, at_P: Ints, k: int) -> NDArray[np.float32]:
    """Mass outside the first k tokens: the logged rest, and the logged tokens beyond k."""
    beyond_P = np.exp(signal.top_logp[at_P, k:].astype(np.float32)).sum(-1)
    rest_P: NDArray[np.float32] = signal.rest_mass[at_P].astype(np.float32) + beyond_P
    return rest_P


def _mask(examples: Sequence[Example], length: int) -> Tensor:
    if not any(example.kind_P.any() for example in examples):
        mask_BT = torch.zeros(len(examples), length, dtype=torch.long)
        for b, example in enumerate(examples):
            mask_BT[b, : len(example.ids_T)] = 1
        return mask_BT
    mask_BTT = np.zeros((len(examples), length, length), bool)
    mask_BTT[:, :, 0] = True  # Padding must see a token, or its softmax is NaN.
    column_T = np.arange(length)
    for b, example in enumerate(examples):
        own = len(example.ids_T)
        before_TT = column_T < example.visible_T[:, None]
        segment_TT = column_T >= example.own_T[:, None]
        causal_TT = column_T <= column_T[:own, None]
        mask_BTT[b, :own] = before_TT | (segment_TT & causal_TT)
    return torch.from_numpy(mask_BTT)[:, None]


def split_by_memory(
    examples: Sequence[Example], vocab_size: int, most: int
) -> Iterator[list[Example]]:
    """Groups in order: up to `most` examples, and up to `MAX_LOGITS` logits; at least one."""
    group: list[Example] = []
    first = last = 0
    for example in examples:
        start = int(example.column_P.min(initial=len(example.ids_T)))
        end = len(example.ids_T)
        low, high = (min(first, start), max(last, end)) if group else (start, end)
        logits = (len(group) + 1) * (high - low) * vocab_size
        if group and (len(group) == most or logits > MAX_LOGITS):
            yield group
            group, low, high = [], start, end
        group.append(example)
        first, last = low, high
    if group:
        yield group


def batches(
    examples: Sequence[Example], size: int, rng: np.random.Generator
) -> Iterator[list[Example]]:
    """One pass in random order. Sequences of similar length share a batch, to save padding."""
    shuffled = rng.permutation(len(examples))
    order = sorted(shuffled, key=lambda i: len(examples[i].ids_T))
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    for group in rng.permutation(len(groups)):
        yield [examples[i] for i in groups[group]]


def epoch_batches(passes: Sequence[Sequence[Example]], recipe: Recipe) -> Iterator[list[Example]]:
    """Every batch of every epoch. Epochs beyond the last pass begin with the first again."""
    rng = np.random.default_rng(recipe.seed)
    for examples in islice(cycle(passes), recipe.epochs):
        yield from batches(examples, recipe.batch_signals, rng)


def step_count(passes: Sequence[Sequence[object]], recipe: Recipe) -> int:
    """The number of batches in `epoch_batches`."""
    sizes = [len(examples) for examples in islice(cycle(passes), recipe.epochs)]
    return sum(math.ceil(size / recipe.batch_signals) for size in sizes)
