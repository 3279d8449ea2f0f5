"""Training of the embedded models from scratch.

Legend: B sequences of a step, T tokens of a sequence, V vocabulary.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lab.output import say

VOCABULARY = 4096
CONTEXT = 512
CHECKPOINT_S = 120.0
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "head_dim": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
SHAPES = {
    "target": {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "draft": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def batch(ids: np.ndarray, rows: int, rng: np.random.Generator) -> torch.Tensor:
    starts = rng.integers(0, len(ids) - CONTEXT - 1, rows)
    return torch.from_numpy(np.stack([ids[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


def loss_of(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids_BT.device.type, dtype=torch.bfloat16):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


class Training:
    """One model: Muon for matrices, AdamW for the rest, warm-up, then linear decay by the clock."""

    def __init__(
        self, name: str, work: Path, minutes: float, rows: int, device: str, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.name, self.minutes, self.rows, self.device = name, minutes, rows, device
        self.model = LlamaForCausalLM(LlamaConfig(**COMMON, **SHAPES[name])).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named if p.ndim != 2 or "embed" in n]
        muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.05, "adjust_lr_fn": "original"}
        self.optimizers = [
            torch.optim.Muon(matrices, **muon),
            torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_lr = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.checkpoint = work / f"{name}.pt"
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)

    def run(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        rng, saved = np.random.default_rng(self.step), time.monotonic()
        while self.seconds < 60 * self.minutes:
            started = time.monotonic()
            self._learn(batch(train, self.rows, rng).to(self.device))
            self.seconds += time.monotonic() - started
            if self.step % 20 == 0:
                rate, minutes = self.tokens / self.seconds, self.seconds / 60
                progress = f"{rate:.0f} tokens/s, {minutes:.1f} of {self.minutes:.0f} min"
                say(f"{self.name} step {self.step}: loss {self.loss:.3f}, {progress}")
            if time.monotonic() - saved > CHECKPOINT_S:
                self.save()
                saved = time.monotonic()
        self.save()
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 1),
            "train_loss": round(self.loss, 3),
            "held_out_loss": round(self.evaluate(held_out), 3),
        }

    @property
    def tokens(self) -> int:
        return self.step * self.rows * CONTEXT

    def _learn(self, ids_BT: torch.Tensor) -> None:
        progress = self.seconds / (60 * self.minutes)
        factor = min(1.0, (self.step + 1) / 30, max(0.02, (1 - progress) / 0.6))
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        loss = loss_of(self.forward, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.loss += (loss.item() - self.loss) * max(0.02, 1 / self.step)

    @torch.no_grad()
    def evaluate(self, held_out: np.ndarray) -> float:
        rng = np.random.default_rng(1)
        batches = [batch(held_out, 8, rng).to(self.device) for _ in range(12)]
        return float(np.mean([loss_of(self.model, ids_BT).item() for ids_BT in batches]))
