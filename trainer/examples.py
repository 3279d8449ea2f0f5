"""Training examples: a signal's tokens laid out for one forward.

A rejected branch stands behind its sequence and shares the forward. Its
tokens keep the positions at which they were drafted, and a tree mask lets
each see the emitted tokens before the branch and the branch's own tokens
before it. Mask tokens work the same way, for drafts that draft a whole
chain in one forward (ParallelSpec, arXiv 2410.05589): behind every other
emitted token stand some masks, which learn the target's distributions at
the positions that they hold.

Legend: T tokens (emitted, of branches, and masks) · P supervised positions.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online.signals import Signal

HELD_OUT_EVERY = 5  # one request in five is never trained on
MASKED_EVERY = 2  # one emitted token in two has masks behind it
PATH, BRANCH, MASK = 0, 1, 2  # kinds of supervised positions
Ints = NDArray[np.int64]
Segment = tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints]  # the arrays of an example, in order


@dataclass(frozen=True, slots=True)
class Example:
    """One signal, laid out: the emitted sequence, then its branches, then its masks."""

    ids_T: Ints
    position_T: Ints
    # A token sees the first `visible_T` tokens, and those from `own_T` up to itself.
    visible_T: Ints
    own_T: Ints
    column_P: Ints  # token whose logits predict the supervised position
    verified_P: Ints  # the signal's verified position with the target's distribution
    kind_P: Ints  # PATH, BRANCH or MASK
    signal: Signal

    @classmethod
    def of(
        cls,
        signal: Signal,
        branch_tokens: int = 0,
        masks: int = 0,
        mask_id: int = 0,
    ) -> "Example":
        """Takes up to `branch_tokens` tokens of each branch, and `masks` masks a place."""
        path = np.array(list(signal.path()), np.int64).reshape(-1, 2)
        segments = [_emitted(signal, path)]
        if branch_tokens:
            _add_branches(segments, signal, branch_tokens)
        if masks:
            _add_masks(segments, signal, path, masks, mask_id)
        ids_T, position_T, visible_T, own_T, column_P, verified_P, kind_P = (
            np.concatenate(parts) for parts in zip(*segments, strict=True)
        )
        return cls(
            ids_T,
            position_T,
            visible_T,
            own_T,
            column_P,
            verified_P,
            kind_P,
            signal,
        )


def _emitted(signal: Signal, path: Ints) -> Segment:
    ids_T = np.concatenate([signal.prompt_ids, signal.output_ids]).astype(np.int64)
    own_T = np.arange(len(ids_T))
    column_P = len(signal.prompt_ids) + path[:, 0] - 1
    kind_P = np.full(len(path), PATH)
    return ids_T, own_T, own_T + 1, own_T, column_P, path[:, 1], kind_P


def _add_branches(segments: list[Segment], signal: Signal, most: int) -> None:
    prompt = len(signal.prompt_ids)
    for start, branch, count, verified in signal.branches():
        count = min(count, most)
        ids_T = signal.branch_ids[branch : branch + count].astype(np.int64)
        verified_P = verified + np.arange(count)
        _add(segments, ids_T, prompt + start, verified_P, BRANCH)


def _add_masks(
    segments: list[Segment], signal: Signal, path: Ints, masks: int, mask_id: int
) -> None:
    prompt = len(signal.prompt_ids)
    for first in range(1, len(path), MASKED_EVERY):
        held = path[first : first + masks]
        place = held[0, 0]
        if (held[:, 0] != np.arange(place, place + len(held))).any():
            continue  # Masks hold consecutive positions only.
        ids_T = np.full(len(held), mask_id)
        _add(segments, ids_T, prompt + place - 1, held[:, 1], MASK)


def _add(segments: list[Segment], ids_T: Ints, visible: int, verified_P: Ints, kind: int) -> None:
    """Adds tokens that follow the first `visible` ones; each of them is supervised."""
    before = sum(len(ids) for ids, *_ in segments)
    offset_T = np.arange(len(ids_T))
    visible_T = np.full(len(ids_T), visible)
    own_T = np.full(len(ids_T), before)
    kind_P = np.full(len(ids_T), kind)
    position_T, column_P = visible + offset_T, before + offset_T
    segments.append((ids_T, position_T, visible_T, own_T, column_P, verified_P, kind_P))


def held_out(signal: Signal) -> bool:
    """Splits by a hash of the request: all its answers are on the same side in every cycle."""
    return hashlib.sha256(signal.origin.encode()).digest()[0] % HELD_OUT_EVERY == 0


def usable(signal: Signal, vocab_size: int) -> bool:
    """Whether the draft can learn from the signal: it emitted tokens, all within the vocabulary."""
    if len(signal.output_ids) == 0 or not np.isfinite(signal.top_logp).all():
        return False
    ids = (signal.prompt_ids, signal.output_ids, signal.branch_ids, signal.top_ids)
    return max(int(array.max(initial=0)) for array in ids) < vocab_size
