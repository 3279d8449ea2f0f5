"""Sources of prompts for a route without queries."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.warmup.answers import Prompts
from lab.warmup.disagreement import Frame, Growth, grown

SOURCES = {
    "random": "token ids drawn uniformly",
    "disagree": "random prompts whose answers the students disagree on most (Dual Student)",
    "sampled": "samples of the students",
    "disputed": "samples of the students that they disagree on most",
    "own": "none: the target writes query and answer",
}
STUDENTS = {
    "random": 1,
    "disagree": 2,
    "sampled": 2,
    "disputed": 2,
    "own": 1,
}  # that each needs
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
    source: str,
    count: int,
    students: list[nn.Module],
    frame: Frame,
    children: int,
    vocab_size: int,
    seed: int,
) -> Prompts:
    """`count` prompts; the same seed and students give the same prompts."""
    if source == "own":
        return [list(frame.head) for _ in range(count)]
    selected, sampled = (
        source in ("disagree", "disputed"),
        source in ("sampled", "disputed"),
    )
    growth = Growth(children=children if selected else 1, sampled=sampled)
    ids_FT = grown(students, frame, count, growth, vocab_size, seed)
    return [[*ids_T, *frame.tail] for ids_T in ids_FT.tolist()]
