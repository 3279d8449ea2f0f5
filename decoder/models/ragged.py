"""Sequences of different lengths in one call: padding, budgets, and neighbouring slots.

Legend: B sequences, T tokens of the longest of them.
"""

import numpy as np
import torch
from torch import Tensor

from decoder.device.transfer import upload
from decoder.models.base import LanguageModel
from decoder.models.kv_cache import Slots


def integers(values: list[int], device: torch.device | str) -> Tensor:
    return upload(np.array(values, np.int64), device)


def ragged(sequences: list[list[int]], device: torch.device | str) -> Tensor:
    """Token lists as one padded [B, T]."""
    longest = max(map(len, sequences))
    padded = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
    return upload(np.array(padded, np.int64), device)


def encode(
    model: LanguageModel,
    members: list[int],
    pieces: list[list[int]],
    starts: list[int],
    device: torch.device | str,
) -> None:
    """Appends a piece of its prompt to each member's context, from `starts` on."""
    if members:
        upto = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True))
        model.encode(slots_of(members), ragged(pieces, device), integers(starts, device), upto)


def fit(sequences: list[list[int]], budget: int) -> list[list[int]]:
    """The first sequences that fit into `budget` tokens, padding included.

    Only the last of them may be cut.
    """
    pieces: list[list[int]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        if pieces and longest * (len(pieces) + 1) > budget:
            break
        pieces.append(sequence[:budget])
        if len(sequence) > budget:
            break  # the sequences after it wait, to become ready in order
    return pieces


def slots_of(members: list[int]) -> Slots:
    """Neighbouring slots as a slice: the cache returns a view for it, and a copy for a list."""
    adjacent = members[-1] - members[0] + 1 == len(members)
    return slice(members[0], members[-1] + 1) if adjacent else members
