"""How good drafts are on held-out requests, by request, for paired comparisons.

Legend: R requests · P supervised positions · C logged classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lab.output import table
from lab.statistics import Floats, paired_difference
from lab.warmup.models import pad_id
from online.signals import Signal
from trainer.batches import collate
from trainer.divergences.forward_kl import forward_kl
from trainer.evaluation import Evaluation, evaluate
from trainer.examples import Example
from trainer.losses import draft_logits
from trainer.truncated import draft_classes

HELD_OUT_GAMMA = 4
BATCH = 16


def measure_quality(module: nn.Module, signals: Sequence[Signal]) -> Evaluation:
    """Expected tokens of a step at γ = HELD_OUT_GAMMA, and acceptance."""
    return evaluate(module, signals, HELD_OUT_GAMMA, pad_id(module))


@torch.inference_mode()
def kl_from_target(module: nn.Module, signals: Sequence[Signal]) -> Floats:
    """Mean KL(p‖q) in nats [R], over the logged tokens and the rest as one class."""
    found: list[float] = []
    for at in range(0, len(signals), BATCH):
        examples = [Example.of(signal) for signal in signals[at : at + BATCH]]
        batch = collate(examples, pad_id(module), next(module.parameters()).device)
        draft_logp_PC = draft_classes(draft_logits(module, batch), batch.target.ids_PK)
        kl_P = forward_kl(batch.target.classes_PC, draft_logp_PC).double()
        found += [kl_P[batch.sequence_P == i].mean().item() for i in range(len(examples))]
    return np.array(found)


def compare(before: Evaluation, found: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """Prints and returns the quality of several schemes, each with one draft a seed.

    Differences are in tokens per step, from the first scheme.
    """
    first, *others = found
    mean = {name: _mean(by_seed) for name, by_seed in found.items()}
    over = {name: paired_difference(mean[name].tokens_R, mean[first].tokens_R) for name in others}
    rows = [["before", *_columns(before), "", ""]]
    for name, by_seed in found.items():
        difference = f"{over[name]:+.3f}" if name in over else ""
        seeds = " ".join(f"{each.tokens_R.mean():.3f}" for each in by_seed)
        rows.append([name, *_columns(mean[name]), difference, seeds])
    table(["", "tokens a step", "acceptance", f"over {first} (95 %)", "by seed"], rows)
    drafts = {"before": before, **mean}
    return {
        "tokens_per_step": {name: each.tokens_R.mean() for name, each in drafts.items()},
        "acceptance": {name: each.acceptance_R.mean() for name, each in drafts.items()},
        f"over_{first.replace(' ', '_')}": {name: each.figures for name, each in over.items()},
    }


def _mean(by_seed: Sequence[Evaluation]) -> Evaluation:
    """The mean over drafts that differ only in their seed, by request."""
    return Evaluation(*np.mean(by_seed, 0))


def _columns(quality: Evaluation) -> list[str]:
    return [f"{quality.tokens_R.mean():.3f}", f"{quality.acceptance_R.mean():.3f}"]
