"""How good drafts are on held-out requests, request by request, so that any two of them can be compared in pairs.

Legend: R requests, P supervised positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lab.statistics import Floats
from lab.warmup.answers import HELD_OUT_GAMMA, pad_id
from online.signals import Signal
from trainer.batches import collate
from trainer.divergences.forward_kl import forward_kl
from trainer.evaluation import acceptance, tokens_per_step
from trainer.examples import Example
from trainer.intervals import bootstrap_interval
from trainer.losses import draft_logits
from trainer.truncated import draft_classes

TOGETHER = 16


@dataclass(frozen=True)
class Quality:
    """One draft's, per request."""

    tokens_R: Floats  # expected tokens of a step at γ = EXAM_GAMMA
    acceptance_R: Floats
    kl_R: Floats  # nats, KL(p‖q) over the logged tokens and the rest as one

    @property
    def step(self) -> float:
        return round(float(self.tokens_R.mean()), 3)

    @property
    def row(self) -> str:
        """Of a table: tokens a step, acceptance, KL."""
        return (
            f"{self.tokens_R.mean():14.3f} {self.acceptance_R.mean():11.3f} {self.kl_R.mean():6.2f}"
        )

    @classmethod
    def mean(cls, several: Sequence["Quality"]) -> "Quality":
        """Of drafts that differ in their seed only."""
        fields = ("tokens_R", "acceptance_R", "kl_R")
        return cls(
            *(np.mean([getattr(marks, field) for marks in several], axis=0) for field in fields)
        )


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its 95 % bootstrap interval over requests."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    @property
    def figures(self) -> list[float]:
        return [round(value, 4) for value in (self.mean, self.low, self.high)]


def difference(ours_R: Floats, theirs_R: Floats) -> Difference:
    return Difference(
        float((ours_R - theirs_R).mean()), *bootstrap_interval(ours_R - theirs_R, seed=0)
    )


@torch.inference_mode()
def measure_quality(module: nn.Module, signals: Sequence[Signal]) -> Quality:
    marks: list[tuple[float, float, float]] = []
    for at in range(0, len(signals), TOGETHER):
        examples = [Example.of(signal) for signal in signals[at : at + TOGETHER]]
        batch = collate(examples, pad_id(module), next(module.parameters()).device)
        logits_PV = draft_logits(module, batch)
        kept_P = acceptance(logits_PV, batch).double().cpu().numpy()
        kl_P = (
            forward_kl(batch.target.classes_PC, draft_classes(logits_PV, batch.target.ids_PK))
            .double()
            .cpu()
            .numpy()
        )
        sequence_P = batch.sequence_P.cpu().numpy()
        for row in range(len(examples)):
            own = sequence_P == row
            marks.append(
                (tokens_per_step(kept_P[own], HELD_OUT_GAMMA), kept_P[own].mean(), kl_P[own].mean())
            )
    return Quality(*np.array(marks).T)
