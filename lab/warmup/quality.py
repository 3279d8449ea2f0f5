"""How good a draft is on held-out requests, by request, for paired comparisons.

Legend: R requests · P supervised positions · V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lab.warmup.models import pad_id
from online.signals import Signal
from trainer.batches import collate
from trainer.divergences.forward_kl import forward_kl
from trainer.evaluation import acceptance, tokens_per_step
from trainer.examples import Example
from trainer.intervals import Floats, bootstrap_interval
from trainer.losses import draft_logits
from trainer.truncated import draft_classes

HELD_OUT_GAMMA = 4
BATCH = 16
HEADER = f"{'tokens a step':>14} {'acceptance':>11} {'KL':>6}"


@dataclass(frozen=True)
class Quality:
    """One draft, by request."""

    tokens_R: Floats  # expected tokens of a step at γ = HELD_OUT_GAMMA
    acceptance_R: Floats
    kl_R: Floats  # nats: KL(p‖q) over the logged tokens, with the rest as one class

    @property
    def tokens_per_step(self) -> float:
        return round(float(self.tokens_R.mean()), 3)

    @property
    def acceptance(self) -> float:
        return round(float(self.acceptance_R.mean()), 3)

    @property
    def kl(self) -> float:
        return round(float(self.kl_R.mean()), 3)

    @property
    def columns(self) -> str:
        """Part of a table's row, under `HEADER`."""
        tokens, rate, kl = (self.tokens_R.mean(), self.acceptance_R.mean(), self.kl_R.mean())
        return f"{tokens:14.3f} {rate:11.3f} {kl:6.2f}"

    @classmethod
    def mean(cls, several: Sequence["Quality"]) -> "Quality":
        """The mean over drafts that differ only in their seed."""
        fields = ("tokens_R", "acceptance_R", "kl_R")
        return cls(*(np.mean([getattr(one, field) for one in several], 0) for field in fields))


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its 95 % bootstrap interval over requests."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, ours_R: Floats, theirs_R: Floats) -> "Difference":
        difference_R = ours_R - theirs_R
        return cls(float(difference_R.mean()), *bootstrap_interval(difference_R, seed=0))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def figures(self) -> list[float]:
        return [round(value, 4) for value in (self.mean, self.low, self.high)]


@torch.inference_mode()
def measure_quality(module: nn.Module, signals: Sequence[Signal]) -> Quality:
    rows: list[tuple[float, float, float]] = []
    for at in range(0, len(signals), BATCH):
        examples = [Example.of(signal) for signal in signals[at : at + BATCH]]
        batch = collate(examples, pad_id(module), next(module.parameters()).device)
        logits_PV = draft_logits(module, batch)
        draft_logp_PC = draft_classes(logits_PV, batch.target.ids_PK)
        kl_P = forward_kl(batch.target.classes_PC, draft_logp_PC).double().cpu().numpy()
        rate_P = acceptance(logits_PV, batch).double().cpu().numpy()
        sequence_P = batch.sequence_P.cpu().numpy()
        for sequence in range(len(examples)):
            own = sequence_P == sequence
            tokens = tokens_per_step(rate_P[own], HELD_OUT_GAMMA)
            rows.append((tokens, rate_P[own].mean(), kl_P[own].mean()))
    return Quality(*np.array(rows).T)
