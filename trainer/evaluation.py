"""Marks: what a draft would have done for logged requests, without decoding anything.

Legend: P supervised positions, R requests, T positions of one request.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from online.signals import Signal
from trainer.batches import Example, TrainingBatch, collate, split_by_memory
from trainer.distill import draft_logits
from trainer.divergences import greedy_match, overlap

Floats = NDArray[np.float64]


class Evaluation(NamedTuple):
    """What a draft would have done, request by request."""

    tokens_R: Floats  # expected tokens per step
    acceptance_R: Floats  # mean acceptance probability


def served_gamma(signals: Sequence[Signal], most: int) -> int:
    """The γ that drafts are compared at: what steps that drafted did draft, by the median request; `most` if none did.

    At the γ that a server may draft at most, differences are those of long runs that it hardly ever drafts, and their
    noise hides what is gained where it serves.
    """
    drafted_R = [
        float(s.step_drafted[s.step_drafted > 0].mean()) for s in signals if s.step_drafted.any()
    ]
    return min(most, max(1, round(float(np.median(drafted_R))))) if drafted_R else most


@torch.inference_mode()
def evaluate(
    module: nn.Module, signals: Sequence[Signal], gamma: int, pad_id: int, batch_signals: int = 16
) -> Evaluation:
    """The marks of a draft that drafts γ tokens a step."""
    device = next(module.parameters()).device
    tokens: list[float] = []
    rates: list[float] = []
    examples = [Example.of(signal) for signal in signals]
    for group in split_by_memory(examples, module.config.vocab_size, batch_signals):  # type: ignore[union-attr, arg-type]
        batch = collate(group, pad_id, device)
        acceptance_P = acceptance(draft_logits(module, batch), batch).double().cpu().numpy()
        sequence_P = batch.sequence_P.cpu().numpy()
        for row in range(batch.ids_BT.shape[0]):
            own = acceptance_P[sequence_P == row]
            tokens.append(tokens_per_step(own, gamma))
            rates.append(float(own.mean()))
    return Evaluation(np.array(tokens), np.array(rates))


def acceptance(logits_PV: Tensor, batch: TrainingBatch) -> Tensor:
    """Probability that a drafted token is kept [P]: agreement of first choices for greedy requests, else Σ min(p, q).

    Sampled requests are judged at temperature 1, where the logged distribution is exact.
    """
    greedy_P = (batch.temperature_B == 0)[batch.sequence_P]
    sampled_P = overlap(logits_PV, batch.target)
    return torch.where(greedy_P, greedy_match(logits_PV, batch.target), sampled_P)


def tokens_per_step(acceptance_T: Floats, gamma: int) -> float:
    """Expected tokens of a step with γ drafted tokens, over all positions where a step may begin.

    From position t it emits 1 + Σ_{i ≤ γ} Π_{j < i} α_{t+j} tokens: each further one needs all before it accepted.
    """
    total = np.ones(len(acceptance_T))
    reach = np.ones(len(acceptance_T))
    for i in range(gamma):
        shifted = np.concatenate([acceptance_T[i:], np.zeros(min(i, len(acceptance_T)))])
        reach = reach * shifted
        total += reach
    return float(total.mean())
