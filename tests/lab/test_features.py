"""The generic stage: features that follow the target's."""

from pathlib import Path

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lab.warmup.features import match_features, projector
from tests.signals import taught
from tests.tiny import VOCABULARY, TinyPair
from trainer.recipe import Recipe


def narrow() -> LlamaForCausalLM:
    """A draft of half the target's width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config)


def test_features_come_closer_to_the_targets(pair: TinyPair) -> None:
    """Through a projector, from another width; the target stays as it is."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    as_it_was = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    losses = match_features(
        narrow(), target, taught(pair.target, 40), Recipe(learning_rate=5e-3, epochs=4), pad_id=3
    )
    assert len(losses) == 4 * 5
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(tensor, as_it_was[name]) for name, tensor in target.state_dict().items())
    assert all(parameter.grad is None for parameter in target.parameters())


def test_the_projector_is_no_part_of_the_draft(pair: TinyPair, tmp_path: Path) -> None:
    """What is saved has the names and shapes it had before."""
    draft = narrow()
    shapes = {name: tensor.shape for name, tensor in draft.state_dict().items()}
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    match_features(draft, target, taught(pair.target, 8), Recipe(epochs=1), pad_id=3)
    assert {name: tensor.shape for name, tensor in draft.state_dict().items()} == shapes
    draft.save_pretrained(tmp_path)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() <= shapes.keys()


def test_a_projector_between_equal_widths_begins_as_the_identity(pair: TinyPair) -> None:
    """A draft of the target's layers starts in its feature space; other drafts start by seed."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    assert torch.equal(projector(target, target, seed=0).weight, torch.eye(32))
    first, again, other = (projector(narrow(), target, seed).weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
