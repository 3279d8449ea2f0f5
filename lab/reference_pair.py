"""`make reference-pair`: trains the embedded pair on installed Python source.

The target learns from the standard library and the packages that `lab.corpus` does not hold out;
the draft from the standard library alone, so any other package's code is new to it. Training
stops by the clock, because a contributor plans with time. A checkpoint every two minutes lets a
stopped run resume.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lab import corpus
from lab.options import option, parse
from lab.output import finish, say
from lab.reference_training import CONTEXT, VOCABULARY, Training

SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PACKAGE_BYTES = 12_000_000  # at most, of one package: transformers has 53 MB of similar files
TOKENIZER_FILES = 6000


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path = option(Path("decoder/reference"), "folder for target/ and draft/")
    work: Path = option(Path(".slipstream/reference-pair"), "checkpoints and token ids")
    target_minutes: float = option(60.0, "of training")
    draft_minutes: float = option(6.0, "of training")
    rows: int = option(8, f"sequences of {CONTEXT} tokens a step")
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    compile: bool = option(False, "torch.compile the forward (needs a C compiler)")


def chosen_files(held_out: bool, stdlib_only: bool = False) -> Iterator[corpus.SourceFile]:
    """Files on one side of the split, shuffled by a fixed seed, each package limited in size."""
    files = [file for file in corpus.installed_files() if file.held_out == held_out]
    random.Random(0).shuffle(files)
    left: dict[str, int] = {corpus.STDLIB: 3 * PACKAGE_BYTES}
    for file in files:
        if stdlib_only and file.package != corpus.STDLIB:
            continue
        if left.setdefault(file.package, PACKAGE_BYTES) > 0:
            left[file.package] -= file.path.stat().st_size
            yield file


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
    files = list(chosen_files(held_out=False))[:TOKENIZER_FILES]
    tokenizer.train_from_iterator((file.text() for file in files), trainer)
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


def encode(
    tokenizer: PreTrainedTokenizerFast, files: Iterator[corpus.SourceFile], cache: Path
) -> np.ndarray:
    """All texts as one array of token ids, each closed by <|end|>; cached for a resumed run."""
    if not cache.exists():
        parts: list[np.ndarray] = []
        for file in files:
            encoding = tokenizer.backend_tokenizer.encode(file.text(), add_special_tokens=False)
            parts.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
        np.save(cache, np.concatenate(parts))
    return np.load(cache, mmap_mode="r")


def main() -> None:
    options = parse(Options, "reference-pair", __doc__)
    options.work.mkdir(parents=True, exist_ok=True)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (options.work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.work / "tokenizer")
    else:
        say("training the tokenizer")
        tokenizer = train_tokenizer(options.work / "tokenizer")
    held_out = encode(tokenizer, chosen_files(held_out=True), options.work / "held_out.npy")
    card: dict[str, object] = {}
    for name, minutes in (("draft", options.draft_minutes), ("target", options.target_minutes)):
        files = chosen_files(held_out=False, stdlib_only=name == "draft")
        train = encode(tokenizer, files, options.work / f"{name}_train.npy")
        say(f"{name}: {len(train) / 1e6:.1f} M tokens of text")
        training = Training(name, options.work, minutes, options.rows, device, options.compile)
        card[name] = {"text_tokens": len(train), **training.run(train, held_out)}
        training.model.to(torch.bfloat16).save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
    (options.out / "training.json").write_text(json.dumps(card, indent=2) + "\n")
    finish(card)
