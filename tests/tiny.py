"""Tiny random models on disk, in the Hugging Face layout: what the service loads, made small.

The target's logits are scaled by hand, so that greedy decoding has no near-ties and a draft has
something to learn. `draft` is the target with noise: its tokens are accepted often, not always.
`spoilt` has the same shape and other random weights: it knows nothing of the target.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tokenizer import VOCABULARY, make_tokenizer

transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class TinyPair:
    """Folders of the three models."""

    target: Path
    draft: Path
    spoilt: Path


def make_pair(folder: Path) -> TinyPair:
    """Writes the three models, each with the tokenizer."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=3,
    )
    pair = TinyPair(folder / "target", folder / "draft", folder / "spoilt")
    target = _sharp(LlamaForCausalLM(config), seed=0)
    _save(target, tokenizer, pair.target)
    _save(_noisy(target, seed=1), tokenizer, pair.draft)
    _save(_sharp(LlamaForCausalLM(config), seed=7), tokenizer, pair.spoilt)
    return pair


def _sharp(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    """Weights large enough that contexts matter and distributions are peaked."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 0.5 if "lm_head" in name else 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        model.lm_head.weight[0] = 0  # <|end|> is rare, so that outputs have a length
    return model


def _noisy(model: LlamaForCausalLM, seed: int, noise: float = 0.015) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return copy


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
