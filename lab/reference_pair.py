"""`make reference-pair`: trains the embedded target, draft and tokenizer on installed Python source code.

The target sees the standard library and the packages that `lab.corpus` does not hold out; the draft sees the standard
library alone, so that any other package's code is a shift for it. Training stops by the clock, because that is what
a contributor plans with; a checkpoint every few minutes makes a stopped run resume.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lab import corpus

VOCABULARY = 4096
CONTEXT = 512
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_PACKAGE_CHARS = (
    12_000_000  # one package (transformers is 53 MB of look-alikes) must not drown the others
)

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


def texts(held_out: bool, stdlib_only: bool = False) -> list[tuple[str, str]]:
    """(package, text) of the files on one side of the hold-out, shuffled by a fixed seed, each package capped."""
    files = [f for f in corpus.installed_files() if f.held_out == held_out]
    random.Random(0).shuffle(files)
    left: dict[str, int] = {}
    chosen = []
    for file in files:
        if stdlib_only and file.package != corpus.STDLIB:
            continue
        room = left.setdefault(
            file.package, MAX_PACKAGE_CHARS * (3 if file.package == corpus.STDLIB else 1)
        )
        if room > 0:
            text = file.text()
            left[file.package] -= len(text)
            chosen.append((file.package, text))
    return chosen


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in texts(held_out=False)[:6000]), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL_TOKENS[1:3],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], cache: Path) -> np.ndarray:
    """All documents as one row of token ids, each closed by <|end|>; kept in `cache` for a resumed run."""
    if not cache.exists():
        rows: list[np.ndarray] = []
        for at in range(0, len(documents), 500):
            encodings = tokenizer.backend_tokenizer.encode_batch(
                documents[at : at + 500], add_special_tokens=False
            )
            rows += [np.array([*e.ids, tokenizer.eos_token_id], dtype=np.uint16) for e in encodings]
        np.save(cache, np.concatenate(rows))
    return np.load(cache, mmap_mode="r")


def batch(ids: np.ndarray, rows: int, rng: np.random.Generator) -> torch.Tensor:
    starts = rng.integers(0, len(ids) - CONTEXT - 1, rows)
    return torch.from_numpy(np.stack([ids[s : s + CONTEXT + 1] for s in starts]).astype(np.int64))


def loss_of(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu" if ids_BT.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


class Training:
    """One model's run: Muon for the matrices, AdamW for the rest, warm-up, then a linear decay by the clock."""

    def __init__(
        self, name: str, work: Path, minutes: float, rows: int, device: str, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.name, self.minutes, self.rows, self.device = name, minutes, rows, device
        self.model = LlamaForCausalLM(LlamaConfig(**COMMON, **SHAPES[name])).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=0.02, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"
            ),
            torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_lr = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.checkpoint = work / f"{name}.pt"
        self.step, self.seconds = 0, 0.0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)

    def set_lr(self) -> None:
        progress = self.seconds / (60 * self.minutes)
        factor = min(1.0, (self.step + 1) / 30, max(0.02, (1 - progress) / 0.6))
        for optimizer, lr in zip(self.optimizers, self.base_lr, strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor

    def run(self, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
        rng = np.random.default_rng(self.step)
        last_save, mean = time.monotonic(), 0.0
        while self.seconds < 60 * self.minutes:
            started = time.monotonic()
            self.set_lr()
            loss = loss_of(self.forward, batch(train, self.rows, rng).to(self.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            mean += (loss.item() - mean) * max(0.02, 1 / self.step)
            self.seconds += time.monotonic() - started
            if self.step % 20 == 0:
                rate = self.step * self.rows * CONTEXT / self.seconds
                print(
                    f"{self.name} step {self.step} loss {mean:.3f} {rate:.0f} tokens/s "
                    f"{self.seconds / 60:.1f}/{self.minutes:.0f} min",
                    flush=True,
                )
            if time.monotonic() - last_save > 120:
                self.save()
                last_save = time.monotonic()
        self.save()
        return {
            "steps": self.step,
            "tokens": self.step * self.rows * CONTEXT,
            "minutes": round(self.seconds / 60, 1),
            "train_loss": round(mean, 3),
            "held_out_loss": round(self.evaluate(held_out), 3),
        }

    @torch.no_grad()
    def evaluate(self, held_out: np.ndarray) -> float:
        rng = np.random.default_rng(1)
        return float(
            np.mean(
                [
                    loss_of(self.model, batch(held_out, 8, rng).to(self.device)).item()
                    for _ in range(12)
                ]
            )
        )


def export(training: Training, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    training.model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab reference-pair", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("decoder/reference"), help="where target/ and draft/ go"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(".slipstream/reference-pair"),
        help="checkpoints, token ids",
    )
    parser.add_argument("--target-minutes", type=float, default=60)
    parser.add_argument("--draft-minutes", type=float, default=6)
    parser.add_argument("--rows", type=int, default=8, help=f"sequences of {CONTEXT} tokens a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training forward (needs a C compiler)",
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    if (args.work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    else:
        print("training the tokenizer", flush=True)
        tokenizer = train_tokenizer(args.work / "tokenizer")
    held_out = encode(tokenizer, [t for _, t in texts(held_out=True)], args.work / "held_out.npy")
    card: dict[str, object] = {}
    for name, minutes in (("draft", args.draft_minutes), ("target", args.target_minutes)):
        documents = [t for _, t in texts(held_out=False, stdlib_only=name == "draft")]
        train = encode(tokenizer, documents, args.work / f"{name}_train.npy")
        print(f"{name}: {len(train) / 1e6:.1f} M tokens of text", flush=True)
        training = Training(name, args.work, minutes, args.rows, args.device, args.compile)
        card[name] = {"text_tokens": len(train), **training.run(train, held_out)}
        export(training, tokenizer, args.out / name)
    (args.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
