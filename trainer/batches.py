"""From signals to tensors: whole sequences with their rejected branches, and the target's distribution at every
supervised position.

A rejected branch stands behind its sequence and shares the forward: its tokens have the positions that they were
drafted at, and a tree mask lets each see the emitted tokens before the branch and the branch's own before it. So do
mask tokens, for drafts that draft a whole chain in one forward (ParallelSpec, arXiv 2410.05589): behind every other
emitted token stand some, and learn what the target said at the places that they hold.

Legend: B sequences, T tokens (emitted and of branches), P supervised positions of the batch, K = top-k.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online.signals import Signal
from trainer.divergences import Truncated

LOGITS_AT_ONCE = 2**27  # numbers: half a gibibyte, and a few times that with their gradients
HELD_OUT_SHARE = 5  # one request in so many is never trained on
MASKED = 2  # one emitted token in so many has masks behind it
PATH, BRANCH, MASK = 0, 1, 2  # kinds of supervised positions
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """One signal, laid out: the emitted sequence, then its branches."""

    ids_T: Ints
    position_T: Ints
    seen_T: Ints  # a token sees so many of the first tokens,
    own_T: Ints  # and those from here up to itself
    column_P: Ints  # whose logits predict what the target's distribution was logged of
    logged_P: Ints  # which of the signal's verified positions that is
    kind_P: Ints  # PATH, BRANCH or MASK
    signal: Signal

    @classmethod
    def of(
        cls, signal: Signal, branch_tokens: int = 0, masks: int = 0, mask_id: int = 0
    ) -> "Example":
        """With the first `branch_tokens` tokens of every rejected branch, and so many `masks` a place."""
        emitted = np.concatenate([signal.prompt_ids, signal.output_ids]).astype(np.int64)
        prompt, length = len(signal.prompt_ids), len(emitted)
        path = np.array(list(signal.path()), np.int64).reshape(-1, 2)
        ids, positions, seen, own = (
            [emitted],
            [np.arange(length)],
            [np.arange(1, length + 1)],
            [np.arange(length)],
        )
        columns, logged, kinds, end = (
            [prompt + path[:, 0] - 1],
            [path[:, 1]],
            [np.full(len(path), PATH)],
            length,
        )
        for start, branch, count, verified in signal.branches() if branch_tokens else ():
            count = min(count, branch_tokens)
            ids.append(signal.branch_ids[branch : branch + count].astype(np.int64))
            positions.append(prompt + start + np.arange(count))
            seen.append(np.full(count, prompt + start))
            own.append(np.full(count, end))
            columns.append(end + np.arange(count))
            logged.append(verified + np.arange(count))
            kinds.append(np.full(count, BRANCH))
            end += count
        for first in range(
            1, len(path) if masks else 0, MASKED
        ):  # of the places that masks behind one token hold
            count = min(masks, len(path) - first)
            place, column = path[first, 0], prompt + path[first, 0] - 1
            if (path[first : first + count, 0] != np.arange(place, place + count)).any():
                continue
            ids.append(np.full(count, mask_id))
            positions.append(column + np.arange(count))
            seen.append(np.full(count, column))
            own.append(np.full(count, end))
            columns.append(end + np.arange(count))
            logged.append(path[first : first + count, 1])
            kinds.append(np.full(count, MASK))
            end += count
        ids_T, position_T, seen_T, own_T = (
            np.concatenate(parts) for parts in (ids, positions, seen, own)
        )
        column_P, logged_P, kind_P = (np.concatenate(parts) for parts in (columns, logged, kinds))
        return cls(ids_T, position_T, seen_T, own_T, column_P, logged_P, kind_P, signal)


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    ids_BT: Tensor
    position_BT: Tensor
    mask: (
        Tensor  # [B, T]: 1 where there is a token; with branches [B, 1, T, T]: what each token sees
    )
    sequence_P: Tensor
    column_P: Tensor
    kind_P: Tensor
    target: Truncated
    temperature_B: Tensor


def held_out(signal: Signal) -> bool:
    """Split by request, by hash: all answers to it are on the same side in every cycle, replayed or new."""
    return hashlib.sha256(signal.origin.encode()).digest()[0] % HELD_OUT_SHARE == 0


def usable(signal: Signal, vocab_size: int) -> bool:
    """A signal that teaches this draft something: emitted tokens, and no ids beyond its vocabulary."""
    if len(signal.output_ids) == 0 or not np.isfinite(signal.top_logp).all():
        return False
    ids = (signal.prompt_ids, signal.output_ids, signal.branch_ids, signal.top_ids)
    return max(int(a.max(initial=0)) for a in ids) < vocab_size


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str) -> TrainingBatch:
    """One padded batch."""
    length = max(len(example.ids_T) for example in examples)
    ids_BT = np.full((len(examples), length), pad_id, np.int64)
    position_BT = np.zeros_like(ids_BT)
    for i, example in enumerate(examples):
        ids_BT[i, : len(example.ids_T)], position_BT[i, : len(example.ids_T)] = (
            example.ids_T,
            example.position_T,
        )
    k = min(example.signal.top_ids.shape[1] for example in examples)
    own = [(example.signal, example.logged_P) for example in examples]
    target = Truncated(
        torch.from_numpy(np.concatenate([s.top_ids[at, :k] for s, at in own]).astype(np.int64)).to(
            device
        ),
        torch.from_numpy(
            np.concatenate([s.top_logp[at, :k] for s, at in own]).astype(np.float32)
        ).to(device),
        torch.from_numpy(np.concatenate([_rest(s, at, k) for s, at in own])).to(device),
    )
    rows = [np.full(len(example.column_P), i) for i, example in enumerate(examples)]
    return TrainingBatch(
        torch.from_numpy(ids_BT).to(device),
        torch.from_numpy(position_BT).to(device),
        _mask(examples, length).to(device),
        torch.from_numpy(np.concatenate(rows)).to(device),
        torch.from_numpy(np.concatenate([example.column_P for example in examples])).to(device),
        torch.from_numpy(np.concatenate([example.kind_P for example in examples])).to(device),
        target,
        torch.tensor([example.signal.temperature for example in examples], device=device),
    )


def _mask(examples: Sequence[Example], length: int) -> Tensor:
    if not any(example.kind_P.any() for example in examples):
        mask_BT = torch.zeros(len(examples), length, dtype=torch.long)
        for i, example in enumerate(examples):
            mask_BT[i, : len(example.ids_T)] = 1
        return mask_BT
    mask_BTT = np.zeros((len(examples), length, length), bool)
    mask_BTT[:, :, 0] = True  # padding sees something, or its softmax is of no numbers
    column_T = np.arange(length)
    for i, example in enumerate(examples):
        row_T1, seen_T1, own_T1 = (
            column_T[: len(example.ids_T), None],
            example.seen_T[:, None],
            example.own_T[:, None],
        )
        mask_BTT[i, : len(example.ids_T)] = (column_T < seen_T1) | (
            (column_T >= own_T1) & (column_T <= row_T1)
        )
    return torch.from_numpy(mask_BTT)[:, None]


def _rest(signal: Signal, at: Ints, k: int) -> NDArray[np.float32]:
    """Mass outside the first k: what was logged as rest, and the logged tokens beyond k."""
    beyond = np.exp(signal.top_logp[at, k:].astype(np.float32)).sum(-1)
    rest: NDArray[np.float32] = signal.rest_mass[at].astype(np.float32) + beyond
    return rest


def split_by_memory(
    examples: Sequence[Example], vocab_size: int, most: int
) -> Iterator[list[Example]]:
    """In order, `most` at a time or as many as there is room for the logits of; at least one."""
    group: list[Example] = []
    first = last = 0
    for example in examples:
        start, end = int(example.column_P.min(initial=len(example.ids_T))), len(example.ids_T)
        low, high = (min(first, start), max(last, end)) if group else (start, end)
        if group and (
            len(group) == most or (len(group) + 1) * (high - low) * vocab_size > LOGITS_AT_ONCE
        ):
            yield group
            group, low, high = [], start, end
        group.append(example)
        first, last = low, high
    if group:
        yield group


def batches(
    examples: Sequence[Example], size: int, rng: np.random.Generator
) -> Iterator[list[Example]]:
    """One pass in random order, sequences of like length together, so that little is padding."""
    order = sorted(rng.permutation(len(examples)), key=lambda i: len(examples[i].ids_T))
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    for group in rng.permutation(len(groups)):
        yield [examples[i] for i in groups[group]]
