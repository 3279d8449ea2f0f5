"""Evaluation: what a draft would have done for logged requests, without decoding.

Legend: P supervised positions · R requests · T positions of one request · V
vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from online.signals import Signal
from trainer.batches import TrainingBatch, collate, split_by_memory
from trainer.examples import Example
from trainer.intervals import Floats
from trainer.losses import draft_logits
from trainer.truncated import greedy_match, overlap


class Evaluation(NamedTuple):
    """One draft, by request."""

    tokens_R: Floats  # expected tokens per step
    acceptance_R: Floats  # mean acceptance rate


def served_gamma(signals: Sequence[Signal], most: int) -> int:
    """The γ at which to compare drafts: drafted tokens per drafting step, of the median request.

    `most` if no step drafted. At the largest γ that a server may draft,
    differences come from long runs that it rarely drafts, and their noise
    hides the gain where it serves.
    """
    drafted_R = []
    for signal in signals:
        drafting = signal.step_drafted[signal.step_drafted > 0]
        if len(drafting):
            drafted_R.append(float(drafting.mean()))
    if not drafted_R:
        return most
    return min(most, max(1, round(float(np.median(drafted_R)))))


@torch.inference_mode()
def evaluate(
    module: nn.Module,
    signals: Sequence[Signal],
    gamma: int,
    pad_id: int,
    batch_signals: int = 16,
) -> Evaluation:
    """Evaluates a draft that drafts γ tokens a step."""
    device = next(module.parameters()).device
    tokens: list[float] = []
    rates: list[float] = []
    examples = [Example.of(signal) for signal in signals]
    vocab_size: int = module.config.vocab_size  # type: ignore[union-attr, assignment]
    for group in split_by_memory(examples, vocab_size, batch_signals):
        batch = collate(group, pad_id, device)
        acceptance_P = acceptance(draft_logits(module, batch), batch).double().cpu().numpy()
        sequence_P = batch.sequence_P.cpu().numpy()
        for sequence in range(len(group)):
            acceptance_T = acceptance_P[sequence_P == sequence]
            tokens.append(tokens_per_step(acceptance_T, gamma))
            rates.append(float(acceptance_T.mean()))
    return Evaluation(np.array(tokens), np.array(rates))


def acceptance(logits_PV: Tensor, batch: TrainingBatch) -> Tensor:
    """The acceptance probability of a drafted token [P].

    Greedy requests: whether both prefer the same token. Sampled requests: Σ
    min(p, q) at temperature 1, where the logged distribution is exact.
    """
    greedy_P = (batch.temperature_B == 0)[batch.sequence_P]
    sampled_P = overlap(logits_PV, batch.target)
    return torch.where(greedy_P, greedy_match(logits_PV, batch.target), sampled_P)


def tokens_per_step(acceptance_T: Floats, gamma: int) -> float:
    """Expected tokens of a step with γ drafted tokens: the mean over all starting positions.

    A step at t emits 1 + Σ_{i ≤ γ} Π_{j < i} α_{t+j} tokens: a token counts
    if all before it in the draft are accepted.
    """
    total = np.ones(len(acceptance_T))
    reach = np.ones(len(acceptance_T))
    for i in range(gamma):
        beyond = np.zeros(min(i, len(acceptance_T)))
        reach = reach * np.concatenate([acceptance_T[i:], beyond])
        total += reach
    return float(total.mean())
