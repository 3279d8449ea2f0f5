"""From signals to tensors: whole sequences, and the target's distribution at every emitted position.

Legend: B sequences, T tokens, N supervised positions of the batch, K = top-k.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from online.signals import Signal

HELD_OUT_SHARE = 5  # one request in so many is never trained on


@dataclass(frozen=True, slots=True)
class Batch:
    ids_BT: Tensor
    mask_BT: Tensor  # 1 where there is a token
    row_N: Tensor
    column_N: Tensor  # position whose logits predict the supervised token
    top_ids_NK: Tensor
    top_logp_NK: Tensor
    rest_mass_N: Tensor
    temperature_B: Tensor


def held_out(signal: Signal) -> bool:
    """Split by request, by hash: a request is on the same side in every cycle, replayed or new."""
    return hashlib.sha256(signal.request_id.encode()).digest()[0] % HELD_OUT_SHARE == 0


def usable(signal: Signal, vocab_size: int) -> bool:
    """A signal that teaches this draft something: emitted tokens, and no ids beyond its vocabulary."""
    if len(signal.output_ids) == 0 or not np.isfinite(signal.top_logp).all():
        return False
    return max(int(a.max(initial=0)) for a in (signal.prompt_ids, signal.output_ids, signal.top_ids)) < vocab_size


def collate(signals: Sequence[Signal], pad_id: int, device: torch.device | str) -> Batch:
    """One padded batch. Supervised are the positions on the emitted path; rejected branches need a tree mask."""
    ids = [np.concatenate([s.prompt_ids, s.output_ids]) for s in signals]
    length = max(map(len, ids))
    ids_BT = np.full((len(ids), length), pad_id, np.int64)
    mask_BT = np.zeros((len(ids), length), np.int64)
    rows, columns, positions = [], [], []
    for i, (tokens, signal) in enumerate(zip(ids, signals, strict=True)):
        ids_BT[i, : len(tokens)], mask_BT[i, : len(tokens)] = tokens, 1
        path = np.array(list(signal.path()))
        rows.append(np.full(len(path), i))
        columns.append(len(signal.prompt_ids) + path[:, 0] - 1)
        positions.append(path[:, 1])
    k = min(s.top_ids.shape[1] for s in signals)
    picked = list(zip(signals, positions, strict=True))
    return Batch(
        torch.from_numpy(ids_BT).to(device),
        torch.from_numpy(mask_BT).to(device),
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(np.concatenate(columns)).to(device),
        torch.from_numpy(np.concatenate([s.top_ids[at, :k] for s, at in picked]).astype(np.int64)).to(device),
        torch.from_numpy(np.concatenate([s.top_logp[at, :k] for s, at in picked]).astype(np.float32)).to(device),
        torch.from_numpy(np.concatenate([_rest(s, at, k) for s, at in picked])).to(device),
        torch.tensor([s.temperature for s in signals], device=device),
    )


def _rest(signal: Signal, at: np.ndarray, k: int) -> np.ndarray:
    """Mass outside the first k: what was logged as rest, and the logged tokens beyond k."""
    beyond = np.exp(signal.top_logp[at, k:].astype(np.float32)).sum(-1)
    rest: np.ndarray = signal.rest_mass[at].astype(np.float32) + beyond
    return rest


def batches(signals: Sequence[Signal], size: int, rng: np.random.Generator) -> Iterator[list[Signal]]:
    """One pass in random order, sequences of like length together, so that little is padding."""
    order = sorted(rng.permutation(len(signals)), key=lambda i: len(signals[i].prompt_ids) + len(signals[i].output_ids))
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    for group in rng.permutation(len(groups)):
        yield [signals[i] for i in groups[group]]
