"""Sources of prompts for a route without queries."""

from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.warmup.answers import Prompts
from lab.warmup.disagreement import Frame, Growth, selected

# Token ids drawn uniformly · random prompts whose answers two students disagree on most (Dual
# Student) · no prompt: the target writes query and answer.
Source = Literal["random", "disagree", "own"]
SOURCES: tuple[Source, ...] = ("random", "disagree", "own")
MARK = "¤"


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The tokens around a query in the chat template; without one, the first token of a text."""
    never = sorted(set(tokenizer.added_tokens_decoder))
    if not tokenizer.chat_template:
        first = tokenizer.bos_token_id
        return Frame([tokenizer.eos_token_id if first is None else first], [], never)
    message = [{"role": "user", "content": MARK}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    head, tail = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in rendered.split(MARK)
    )
    return Frame(list(head), list(tail), never)


def prompts(
    source: Source,
    count: int,
    students: list[nn.Module],
    frame: Frame,
    children: int,
    seed: int,
) -> Prompts:
    """`count` prompts; the same seed and students give the same prompts."""
    if source == "own":
        return [list(frame.head) for _ in range(count)]
    growth = Growth(children=children if source == "disagree" else 1)
    ids_FT = selected(students, frame, count, growth, seed)
    return [[*ids_T, *frame.tail] for ids_T in ids_FT.tolist()]
