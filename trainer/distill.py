"""Distillation: a draft learns from logged distributions. No target anywhere."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from online.signals import Signal
from trainer.batches import Batch, batches, collate
from trainer.divergences import forward_kl


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a candidate is made; kept with its version."""

    divergence: str = "forward_kl"
    learning_rate: float = 2e-3
    epochs: int = 4
    batch_signals: int = 8
    warmup_steps: int = 4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Distilled:
    steps: int
    positions: int
    first_loss: float
    last_loss: float
    seconds: float


def draft_logits(module: nn.Module, batch: Batch) -> Tensor:
    """The draft's logits at the supervised positions [N, V]."""
    first = int(batch.column_N.min())  # Most of the draft is its head: prompts before that column do without it.
    kept = batch.ids_BT.shape[1] - first
    out: Tensor = module(
        input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False, logits_to_keep=kept
    ).logits
    return out[batch.row_N, batch.column_N - first].float()


def distill(
    module: nn.Module,
    signals: Sequence[Signal],
    recipe: Recipe,
    pad_id: int,
    still_wanted: Callable[[], None] = lambda: None,
) -> Distilled:
    """Trains `module` (float32) in place. `still_wanted` is called at every step and may raise to end it."""
    device = next(module.parameters()).device
    rng = np.random.default_rng(recipe.seed)
    total = recipe.epochs * math.ceil(len(signals) / recipe.batch_signals)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, recipe.warmup_steps, total))
    losses: list[float] = []
    positions, started = 0, time.monotonic()
    module.train()
    for _ in range(recipe.epochs):
        for group in batches(signals, recipe.batch_signals, rng):
            still_wanted()
            batch = collate(group, pad_id, device)
            loss = forward_kl(
                draft_logits(module, batch), batch.top_ids_NK, batch.top_logp_NK, batch.rest_mass_N
            ).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            positions += len(batch.row_N)
    module.eval()
    edge = max(1, len(losses) // 10)
    first, last = float(np.mean(losses[:edge])), float(np.mean(losses[-edge:]))
    return Distilled(len(losses), positions, first, last, time.monotonic() - started)


def _factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
