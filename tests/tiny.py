"""Tiny random models on disk, in the Hugging Face layout: what the service loads, a thousand times smaller.

The target is sharp (its logits are spread by hand), so that greedy decoding has no near-ties and a draft has something
to learn. The draft is the target with noise: it accepts often, not always. `spoilt` is a draft of the same shape that
knows nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab.reference_pair import CHAT_TEMPLATE, SPECIAL_TOKENS

VOCABULARY = 320


@dataclass(frozen=True)
class TinyPair:
    target: Path
    draft: Path
    spoilt: Path


def make_pair(folder: Path) -> TinyPair:
    tokenizer = _tokenizer()
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


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
