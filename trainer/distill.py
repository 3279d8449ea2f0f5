"""Distillation: a draft learns from logged distributions. The target is not needed.

Legend: P supervised positions.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from online.signals import Signal
from trainer.batches import (
    TrainingBatch,
    collate,
    epoch_batches,
    split_by_memory,
    step_count,
)
from trainer.examples import Example
from trainer.losses import (
    accepts_positions,
    draft_logits,
    draft_loss,
    position_losses,
)
from trainer.recipe import Recipe
from trainer.rehearsal import Rehearsal

WARMUP_STEPS = 4
CLIP_NORM = 1.0
MASK_WEIGHT = 0.5  # of a position that a mask holds; on the emitted path it is 1


@dataclass(frozen=True, slots=True)
class Distilled:
    steps: int
    positions: int  # over all passes
    first_loss: float
    last_loss: float
    seconds: float


def distill(
    module: nn.Module,
    passes: Sequence[Sequence[Signal]],
    recipe: Recipe,
    pad_id: int,
    on_step: Callable[[], None] = lambda: None,
    earlier_draft: nn.Module | None = None,
) -> Distilled:
    """Trains `module` (float32) in place.

    `passes`: the signals of each epoch. Epochs beyond the last pass begin
    with the first again. `on_step` is called before every step and may
    raise, which ends the training. `earlier_draft`: the draft that is
    rehearsed; by default `module` as it is now.
    """
    started = time.monotonic()
    examples = _lay_out(module, passes, recipe, pad_id)
    training = _Training(examples, recipe, pad_id, on_step)
    reference = rehearsal = None
    if recipe.selected_share < 1:
        reference = copy.deepcopy(module)
        training.run(reference)
    if recipe.rehearsal:
        rehearsed = earlier_draft or copy.deepcopy(module)
        rehearsal = Rehearsal(rehearsed, examples[0], recipe.seed)
    losses, positions = training.run(module, reference, rehearsal)
    edge = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:edge])), float(np.mean(losses[-edge:]))
    return Distilled(len(losses), positions, first, last, time.monotonic() - started)


def _lay_out(
    module: nn.Module,
    passes: Sequence[Sequence[Signal]],
    recipe: Recipe,
    pad_id: int,
) -> list[list[Example]]:
    """Each signal becomes one example, however many passes it is in."""
    more = (recipe.branch_tokens, recipe.masks) if accepts_positions(module) else (0, 0)
    made: dict[int, Example] = {}
    for signals in passes:
        for signal in signals:
            if id(signal) not in made:
                made[id(signal)] = Example.of(signal, *more, pad_id)
    return [[made[id(signal)] for signal in signals] for signals in passes]


@dataclass(frozen=True, slots=True)
class _Training:
    """The steps of one training run, for the draft and for AdaSPEC's reference alike."""

    passes: Sequence[Sequence[Example]]
    recipe: Recipe
    pad_id: int
    on_step: Callable[[], None]

    def run(
        self,
        module: nn.Module,
        reference: nn.Module | None = None,
        rehearsal: Rehearsal | None = None,
    ) -> tuple[list[float], int]:
        """The loss of every step, and the number of positions over all passes."""
        total = step_count(self.passes, self.recipe)
        rate = self.recipe.learning_rate
        optimizer, schedule = make_optimizer(module.parameters(), rate, total)
        losses: list[float] = []
        positions = 0
        module.train()
        for group in epoch_batches(self.passes, self.recipe):
            self.on_step()
            optimizer.zero_grad()
            loss, count = self._backward(module, group, reference)
            losses.append(loss)
            positions += count
            if rehearsal is not None:
                moved = self.recipe.rehearsal * rehearsal.loss(module)
                moved.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
        module.eval()
        return losses, positions

    def _backward(
        self,
        module: nn.Module,
        group: Sequence[Example],
        reference: nn.Module | None,
    ) -> tuple[float, int]:
        """Adds the gradients of one batch, in parts that fit in memory."""
        recipe, total, positions = self.recipe, 0.0, 0
        device = next(module.parameters()).device
        weights = torch.tensor([1.0, recipe.branch_weight, MASK_WEIGHT], device=device)
        whole = sum(len(example.column_P) for example in group)
        vocab_size: int = module.config.vocab_size  # type: ignore[union-attr, assignment]
        for part in split_by_memory(group, vocab_size, recipe.batch_signals):
            batch = collate(part, self.pad_id, device)
            loss_P = draft_loss(module, batch, recipe)
            weight_P = weights[batch.kind_P]
            if reference is not None:
                weight_P = weight_P * _selected(loss_P, batch, recipe, reference)
            loss = (loss_P * weight_P).sum() / weight_P.sum() * (len(loss_P) / whole)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            positions += int((weight_P > 0).sum())
        return total, positions


@torch.no_grad()
def _selected(loss_P: Tensor, batch: TrainingBatch, recipe: Recipe, reference: nn.Module) -> Tensor:
    """1 at the positions where the draft lags most behind a trained reference, else 0 [P].

    AdaSPEC (arXiv 2510.19779): positions that the reference cannot learn
    waste the capacity of a small draft.
    """
    reference_P = position_losses(draft_logits(reference, batch), batch, recipe)
    gain_P = loss_P.detach() - reference_P
    count = max(1, round(recipe.selected_share * len(gain_P)))
    return (gain_P >= gain_P.topk(count).values[-1]).to(gain_P.dtype)


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, steps: int
) -> tuple[Optimizer, LambdaLR]:
    """AdamW and its schedule: linear warm-up, then cosine decay to a tenth."""
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))


def learning_rate_factor(step: int, total: int) -> float:
    """The share of the full learning rate at a step."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = min(1.0, (step - WARMUP_STEPS) / max(1, total - WARMUP_STEPS))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
