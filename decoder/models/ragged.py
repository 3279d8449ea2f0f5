"""Sequences of different lengths as one call: what is padded, what is cut, and which slots are neighbours.

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
    return upload(
        np.array([sequence + [0] * (longest - len(sequence)) for sequence in sequences], np.int64),
        device,
    )


def encode(
    model: LanguageModel,
    members: list[int],
    pieces: list[list[int]],
    starts: list[int],
    device: torch.device | str,
) -> None:
    """Appends a piece to each member's context, from its start on."""
    if members:
        upto = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True))
        model.encode(slots_of(members), ragged(pieces, device), integers(starts, device), upto)


def fit(sequences: list[list[int]], budget: int) -> list[list[int]]:
    """As many of the first sequences as `budget` tokens hold, padding included; only the last of them is cut."""
    pieces: list[list[int]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence))
        if pieces and longest * (len(pieces) + 1) > budget:
            break
        pieces.append(sequence[:budget])
        if len(sequence) > budget:
            break  # those behind it wait: the ready ones come first
    return pieces


def slots_of(members: list[int]) -> Slots:
    """Neighbouring slots as a slice: the cache gives a view of those, and a copy of anything else."""
    adjacent = members[-1] - members[0] + 1 == len(members)
    return slice(members[0], members[-1] + 1) if adjacent else members
