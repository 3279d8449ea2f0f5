"""Loads a target, a draft and their tokenizer from folders or hub ids."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from decoder import reference
from decoder.device.placement import dtype_of
from decoder.models import llama
from decoder.models.base import ServedModel
from decoder.models.generic import GenericCache, GenericModel
from decoder.models.kv_cache import KVCache
from decoder.models.llama import Llama
from online.errors import InvalidRequest
from online.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the pair and its tokenizer are: folders or hub ids."""

    target: str
    draft: str
    name: str

    @classmethod
    def of(cls, settings: Settings) -> "ModelFiles":
        target = settings.target or str(reference.TARGET)
        draft = settings.draft or str(reference.DRAFT)
        default = "slipstream-reference" if not settings.target else Path(settings.target).name
        return cls(target, draft, settings.model_name or default)


def load_module(source: str | Path, device: torch.device, dtype: str) -> nn.Module:
    """A causal LM in evaluation mode on the device."""
    module: nn.Module = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype_of(dtype, device), attn_implementation="sdpa"
    )
    return module.to(device).eval().requires_grad_(False)


def load_models(
    source: str | Path,
    count: int,
    slots: int,
    capacity: int,
    device: torch.device,
    dtype: str,
    vocab_size: int = 0,
) -> list[ServedModel]:
    """Loads `count` copies of a model over one cache of `slots` contexts of `capacity` tokens.

    The drafts of all routes have one shape and share a cache, because each sequence uses only one
    of them. Logits are cut or padded to `vocab_size`; 0 means the model's own.
    """
    modules = [load_module(source, device, dtype) for _ in range(count)]
    size = vocab_size or modules[0].get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return over_slots(modules, slots, capacity, size)


def over_slots(
    modules: list[nn.Module], slots: int, capacity: int, vocab_size: int
) -> list[ServedModel]:
    if llama.supported(modules[0].config):  # type: ignore[arg-type]
        cache = KVCache(slots, capacity)
        return [Llama(module, cache, vocab_size) for module in modules]
    shared = GenericCache(slots, capacity)
    return [GenericModel(module, shared, vocab_size) for module in modules]


def save_first_draft(files: ModelFiles, folder: Path) -> None:
    """Saves the first draft as one safetensors file, in its stored precision.

    Tensors get the live module's names. For some families (GPT-NeoX) their files use others.
    """
    module = AutoModelForCausalLM.from_pretrained(files.draft, dtype="auto")
    module.save_pretrained(folder, max_shard_size="1TB", save_original_format=False)


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The target's tokenizer, after checking that the draft's is the same.

    Raises:
        InvalidRequest: the two map tokens to different ids.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(files.target)
    if not tokenizer.is_fast:
        raise InvalidRequest("the target's tokenizer has no fast (tokenizers) form", param="target")
    try:
        draft_tokenizer = AutoTokenizer.from_pretrained(files.draft)
    except (OSError, ValueError):
        return tokenizer  # a draft folder without tokenizer files uses the target's
    if draft_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InvalidRequest(
            "target and draft do not share a tokenizer: their vocabularies differ", param="draft"
        )
    return tokenizer


def refuse_windows(source: str, max_context: int) -> None:
    """Refuses sliding windows and linear attention: slot caches hold whole contexts.

    Raises:
        InvalidRequest: names the model, its kinds of layers and their window.
    """
    config = AutoConfig.from_pretrained(source).get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention"} and (
        not window or getattr(config, "use_sliding_window", True) is False
    ):
        return
    if kinds <= {"full_attention", "sliding_attention"} and window and window >= max_context:
        return
    raise InvalidRequest(
        f"{source}: layers of kind {sorted(kinds)} with window {window} are not supported with "
        f"contexts of {max_context} tokens; a context within the window is",
        param="max_context",
    )


def context_limit(source: str) -> int:
    config = AutoConfig.from_pretrained(source).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def end_ids(source: str) -> frozenset[int]:
    """The tokens that end a sequence."""
    end = AutoConfig.from_pretrained(source).get_text_config().eos_token_id
    try:
        end = GenerationConfig.from_pretrained(source).eos_token_id or end
    except OSError:
        pass  # a model folder need not have a generation_config.json
    return frozenset(end if isinstance(end, list) else [] if end is None else [end])
