"""Drafts that begin as a part of their target."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lab.warmup.initial import spread, thinned
from tests.tiny import TinyPair


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    """One layer alone is the first; more than there are is an error."""
    assert spread(1, 16) == [0]
    assert spread(2, 16) == [0, 15]
    assert spread(4, 16) == [0, 5, 10, 15]
    assert spread(3, 3) == [0, 1, 2]
    for wanted in (0, 4):
        with pytest.raises(ValueError, match="of a target that has 3"):
            spread(wanted, 3)


def test_all_layers_make_the_target_again(pair: TinyPair) -> None:
    """Logit for logit."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(thinned(target, [0, 1])(ids_BT).logits, target(ids_BT).logits)


def test_a_kept_layer_is_the_targets_own_and_a_copy(pair: TinyPair) -> None:
    """The last layer becomes the draft's only one, and training leaves the target unchanged."""
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    draft = thinned(target, [1])
    assert draft.config.num_hidden_layers == 1
    own, theirs = (
        draft.model.layers[0].mlp.up_proj.weight,
        target.model.layers[1].mlp.up_proj.weight,
    )
    assert torch.equal(own, theirs)
    assert torch.equal(draft.model.embed_tokens.weight, target.model.embed_tokens.weight)
    with torch.no_grad():
        own.zero_()
    assert theirs.abs().sum() > 0
    assert target.config.num_hidden_layers == 2


def test_what_is_listed_per_layer_is_thinned_with_the_layers() -> None:
    """Qwen2 says of every layer what it attends to; tied heads stay tied."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    draft = thinned(Qwen2ForCausalLM(config), [0, 3])
    assert len(draft.config.layer_types) == 2
    assert draft.lm_head.weight is draft.model.embed_tokens.weight
    assert draft(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


def test_gpt_neox_is_thinned_too_and_others_are_refused() -> None:
    """What counts is that layers are called layers; a model without any can't be thinned."""
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    whole = GPTNeoXForCausalLM(config)
    assert torch.equal(
        thinned(whole, [0, 2]).gpt_neox.layers[1].mlp.dense_h_to_4h.weight,
        whole.gpt_neox.layers[2].mlp.dense_h_to_4h.weight,
    )
    whole.gpt_neox.blocks = whole.gpt_neox.layers
    del whole.gpt_neox.layers
    with pytest.raises(ValueError, match="can't be told by the names"):
        thinned(whole, [0, 2])
