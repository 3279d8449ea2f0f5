"""What a draft could do before it learnt something else."""

import copy

import torch
from transformers import AutoModelForCausalLM

from tests.signals import taught
from tests.tiny import TinyPair
from trainer.distill import distill
from trainer.examples import Example
from trainer.recipe import Recipe
from trainer.rehearsal import SAMPLES, TOKENS, Rehearsal, write


def draft(pair: TinyPair) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(pair.draft, dtype=torch.float32)  # type: ignore[no-any-return]


def test_samples_are_the_drafts_own_and_repeatable(pair: TinyPair) -> None:
    """From their first tokens on, the same for the same seed, in the draft's distribution."""
    module, first = draft(pair), torch.tensor([[5], [9]])
    ids = write(module, first, 12, seed=1)
    assert ids.shape == (2, 12)
    assert torch.equal(ids[:, :1], first)
    assert torch.equal(ids, write(module, first, 12, seed=1))
    assert not torch.equal(ids, write(module, first, 12, seed=2))
    drawn = write(module, torch.full((4000, 1), 5), 2, seed=0)[:, 1].bincount(minlength=320) / 4000
    wanted = module(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    assert (drawn - wanted).abs().sum() / 2 < 0.1


def test_nothing_has_moved_at_the_start(pair: TinyPair) -> None:
    """And what is rehearsed against stays as it was, however the draft goes on."""
    module = draft(pair)
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


def test_a_draft_that_rehearses_forgets_less(pair: TinyPair) -> None:
    """Taught by a stranger, it stays nearer to what it was on its own samples."""
    moved = []
    for weight in (0.0, 2.0):
        module = draft(pair)
        earlier_draft = Rehearsal(
            copy.deepcopy(module), [Example.of(s) for s in taught(pair.target, 4)], seed=5
        )
        distill(module, [taught(pair.spoilt, 40)], Recipe(epochs=4, rehearsal=weight), pad_id=3)
        moved.append(sum(earlier_draft.loss(module).item() for _ in range(8)))
    assert moved[1] < 0.7 * moved[0]
