"""Models of the warm-up commands: loaded, trained on answers, saved."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lab.output import say
from lab.rig import files_of
from lab.warmup.initial import spread, thinned
from online.signals import Signal
from trainer.batches import step_count
from trainer.distill import Distilled, distill
from trainer.recipe import Recipe


def load_model(source: str | Path) -> nn.Module:
    """In float32, for training."""
    module: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return module


def pad_id(module: nn.Module) -> int:
    return int(module.config.pad_token_id or 0)


def save_model(
    module: nn.Module, folder: Path, like: str | Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Saves in the precision of `like`, and as the service does: one file, live tensor names."""
    dtype = AutoConfig.from_pretrained(like).dtype or torch.float32
    module.to(dtype).save_pretrained(folder, max_shard_size="1TB", save_original_format=False)
    tokenizer.save_pretrained(folder)


def model_from_target(
    target: str, layers: int, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Writes a model of some of the target's layers into `folder`; returns their indices."""
    whole = load_model(target)
    kept = spread(layers, whole.config.num_hidden_layers)
    save_model(thinned(whole, kept), folder, target, tokenizer)
    return kept


def with_draft_from_target(options: Any, layers: int, folder: Path) -> tuple[Any, list[int]]:
    """The options with a draft in place of `layers`, and the indices of the target's layers."""
    target = files_of(options).target
    kept = model_from_target(target, layers, folder, AutoTokenizer.from_pretrained(target))
    return replace(options, draft=str(folder), layers=None), kept


def train(what: str, module: nn.Module, signals: Sequence[Signal], recipe: Recipe) -> Distilled:
    """Distils `module` in place, with ten lines of progress."""
    runs = 2 if recipe.selected_share < 1 else 1  # AdaSPEC trains a reference first
    progress = Progress(what, runs * step_count([signals], recipe))
    return distill(module, [signals], recipe, pad_id(module), progress)


class Progress:
    """Prints a line at every tenth of a training run."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        if self._done % max(1, self._total // 10) == 0:
            elapsed_s = time.monotonic() - self._started
            say(f"{self._what}: step {self._done} of {self._total}, {elapsed_s:.0f} s")
