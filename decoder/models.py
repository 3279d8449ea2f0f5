"""Models: a target and its drafts behind one small interface, and how they are loaded and told apart.

Legend: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from decoder import reference
from decoder.slots import Rows, SlotCache
from online.errors import InvalidRequest
from online.settings import Settings

FINGERPRINT_CHUNK = 1 << 24


class LanguageModel(Protocol):
    """What the engine, the drafters and the enumeration test call. Tests have a tabular one."""

    vocab_size: int

    def forward(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int, *, keep: int = 0) -> Tensor:
        """Appends `ids_BT` to the rows' contexts, row b from position `starts_B[b]` on, and returns logits [B, T, V].

        Whatever a row held from `starts_B[b]` on is replaced. `upto` is the longest context after the call (host-known,
        so that no device is asked for it). `keep`: only the last so many positions' logits; 0 means all.
        """
        ...

    def move(self, source: int, destination: int, length: int) -> None:
        """The context of slot `source` continues in slot `destination`."""
        ...


class SlotModel:
    """Any `transformers` causal LM over slot caches."""

    def __init__(self, module: nn.Module, cache: SlotCache, vocab_size: int) -> None:
        self.module = module
        self.cache = cache
        self.vocab_size = vocab_size
        self.device = next(module.parameters()).device

    @torch.inference_mode()
    def forward(self, rows: Rows, ids_BT: Tensor, starts_B: Tensor, upto: int, *, keep: int = 0) -> Tensor:
        ids_BT, starts_B = ids_BT.to(self.device), starts_B.to(self.device)
        # Padding of short rows may point past the end: the last cell belongs to nobody.
        steps_T = torch.arange(ids_BT.shape[1], device=self.device)
        positions_BT = (starts_B[:, None] + steps_T).clamp_(max=self.cache.capacity - 1)
        mask_B1TK = (torch.arange(upto, device=self.device) <= positions_BT[..., None])[:, None]
        self.cache.aim(rows, positions_BT, upto)
        logits_BTV: Tensor = self.module(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask_B1TK,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return fit_vocabulary(logits_BTV, self.vocab_size)

    def move(self, source: int, destination: int, length: int) -> None:
        self.cache.move(source, destination, length)


def fit_vocabulary(logits_BTV: Tensor, vocab_size: int) -> Tensor:
    """Cuts or pads the last axis: models that share a tokenizer may round their embeddings up differently."""
    missing = vocab_size - logits_BTV.shape[-1]
    return logits_BTV if missing == 0 else nn.functional.pad(logits_BTV, (0, missing), value=-torch.inf)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the pair and its tokenizer are, as settings say it: folders or hub ids."""

    target: str
    draft: str
    name: str

    @classmethod
    def of(cls, settings: Settings) -> "ModelFiles":
        target = settings.target or str(reference.TARGET)
        draft = settings.draft or str(reference.DRAFT)
        default = "slipstream-reference" if not settings.target else Path(settings.target).name
        return cls(target, draft, settings.model_name or default)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_module(source: str | Path, device: torch.device, dtype: str) -> nn.Module:
    """A causal LM from a folder or hub id, ready to serve.

    `dtype` "auto" is float32 on a CPU, where half precision saves nothing for small models, and as stored elsewhere.
    """
    wanted: str | torch.dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and device.type == "cpu":
        wanted = torch.float32
    module: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, attn_implementation="sdpa")
    return module.to(device).eval().requires_grad_(False)


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The target's tokenizer, after checking that the draft speaks the same one.

    Raises:
        InvalidRequest: the two map tokens to different ids.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(files.target)
    if not tokenizer.is_fast:
        raise InvalidRequest("the target's tokenizer has no fast (tokenizers) form", param="target")
    try:
        drafts_own = AutoTokenizer.from_pretrained(files.draft)
    except (OSError, ValueError):
        return tokenizer  # A draft folder without tokenizer files has said that it uses the target's.
    if drafts_own.get_vocab() != tokenizer.get_vocab():
        raise InvalidRequest("target and draft do not share a tokenizer: their vocabularies differ", param="draft")
    return tokenizer


def refuse_windows(source: str, max_context: int) -> None:
    """Slot caches keep whole contexts: a model that forgets (sliding windows, linear attention) is refused, not bent.

    Raises:
        InvalidRequest: names the model and what it does.
    """
    config = AutoConfig.from_pretrained(source).get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds == {"full_attention"} and (not window or getattr(config, "use_sliding_window", True) is False):
        return
    if kinds <= {"full_attention", "sliding_attention"} and window and window >= max_context:
        return
    raise InvalidRequest(
        f"{source}: layers of kind {sorted(kinds)} with window {window} are not supported with contexts of "
        f"{max_context} tokens; a context within the window is",
        param="max_context",
    )


def context_limit(source: str) -> int:
    config = AutoConfig.from_pretrained(source).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once: what a draft's safetensors file holds."""
    tied: Sequence[str] | dict[str, str] = getattr(module, "all_tied_weights_keys", None) or ()
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in tied}


@torch.inference_mode()
def fingerprint(module: nn.Module) -> str:
    """A 64-bit checksum of the weights as they are on the device: cheap enough to compare before and after a swap.

    It sees values and their order. It is no defence against an adversary; the sha256 of the file is.
    """
    total = 0
    for index, (_, tensor) in enumerate(sorted(own_weights(module).items())):
        words = tensor.detach().contiguous().flatten()
        words = words.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()])
        for at in range(0, len(words), FINGERPRINT_CHUNK):
            part = words[at : at + FINGERPRINT_CHUNK].to(torch.int64)
            weight = torch.arange(1, len(part) + 1, device=part.device) * (2 * index + 1) + at
            total = (total * 31 + int((part * weight).sum().item())) % 2**64
    return f"{total:016x}"
