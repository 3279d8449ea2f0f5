"""The tokenizer of the tiny models, trained on a text beside this file."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from decoder.reference import TARGET

TEXT = Path(__file__).with_suffix(".txt")
VOCABULARY = 320
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens and the chat template of the embedded pair."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT.read_text()] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = (TARGET / "chat_template.jinja").read_text()
    return fast
