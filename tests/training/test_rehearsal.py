"""Rehearsal: a draft keeps earlier abilities while it learns."""

import copy

import pytest
import torch

import trainer.rehearsal
from tests.signals import taught
from tests.tiny import TinyPair
from tests.training.conftest import load
from trainer.distill import distill
from trainer.examples import Example
from trainer.recipe import Recipe
from trainer.rehearsal import SAMPLES, TOKENS, Rehearsal, write


def test_samples_follow_the_draft_and_repeat(pair: TinyPair) -> None:
    """They continue their first token in the draft's distribution, the same for a seed."""
    module, first = load(pair.draft), torch.tensor([[5], [9]])
    ids = write(module, first, 12, seed=1)
    assert ids.shape == (2, 12)
    assert torch.equal(ids[:, :1], first)
    assert torch.equal(ids, write(module, first, 12, seed=1))
    assert not torch.equal(ids, write(module, first, 12, seed=2))
    drawn = write(module, torch.full((4000, 1), 5), 2, seed=0)[:, 1].bincount(minlength=320) / 4000
    wanted = module(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    assert (drawn - wanted).abs().sum() / 2 < 0.1


def test_the_loss_is_zero_before_training(pair: TinyPair) -> None:
    """The earlier draft stays unchanged while the draft trains."""
    module = load(pair.draft)
    rehearsal = Rehearsal(
        copy.deepcopy(module), [Example.of(s) for s in taught(pair.target, 4)], seed=0
    )
    assert rehearsal.loss(module).item() < 1e-6
    with torch.no_grad():
        module.lm_head.weight.mul_(1.1)  # type: ignore[union-attr, operator]
    moved = rehearsal.loss(module)
    assert moved.item() > 1e-4
    moved.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert tuple(rehearsal._ids_RT.shape) == (SAMPLES, TOKENS)


def test_a_draft_that_rehearses_forgets_less(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taught by a stranger, it stays closer to its former self on its own samples."""
    monkeypatch.setattr(trainer.rehearsal, "SAMPLES", 32)
    monkeypatch.setattr(trainer.rehearsal, "TOKENS", 32)
    own, strange = taught(pair.target, 4), taught(pair.spoilt, 40)
    moved = []
    for weight in (0.0, 2.0):
        module = load(pair.draft)
        earlier = Rehearsal(load(pair.draft), [Example.of(s) for s in own], seed=5)
        distill(module, [strange], Recipe(epochs=4, rehearsal=weight), pad_id=3)
        moved.append(sum(earlier.loss(module).item() for _ in range(8)))
    assert moved[1] < 0.7 * moved[0]
