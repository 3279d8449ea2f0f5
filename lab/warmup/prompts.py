"""Where prompts come from when nobody has asked anything."""

from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.warmup.lessons import Prompts
from trainer.disagreement import Growth, grown

SOURCES = {
    "random": "token ids drawn alike",
    "sampled": "the students' own samples",
    "disagree": "the students' samples that they disagree on most (Dual Student)",
    "own": "none: the target writes query and answer itself",
}
GROWN = ("sampled", "disagree")  # these need students
MARK = "¤"


@dataclass(frozen=True)
class Frame:
    """What stands around a query, as the model's template has it."""

    head: list[int]
    tail: list[int]
    never: list[int]  # ids that a query has none of

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Frame":
        never = sorted(set(tokenizer.added_tokens_decoder))
        if not tokenizer.chat_template:
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            return cls([first], [], never)
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False
        )
        head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in whole.split(MARK))
        return cls(list(head), list(tail), never)


def prompts(
    source: str, count: int, students: list[nn.Module], frame: Frame, vocab_size: int, growth: Growth, seed: int
) -> Prompts:
    """`count` prompts, which the same seed and students always give."""
    tokens = growth.pieces * growth.piece_tokens
    if source == "own":
        return [list(frame.head) for _ in range(count)]
    if source == "random":
        allowed = np.setdiff1d(np.arange(vocab_size), frame.never)
        bodies = np.random.default_rng(seed).choice(allowed, (count, tokens)).tolist()
        return [[*frame.head, *body, *frame.tail] for body in bodies]
    if source == "sampled":
        growth = Growth(1, growth.pieces, growth.piece_tokens)
    rows = grown(students, frame.head, count, growth, frame.never, seed).tolist()
    return [[*row, *frame.tail] for row in rows]
