"""Where prompts come from when nobody has asked anything."""

from torch import nn
from transformers import PreTrainedTokenizerBase

from lab.warmup.answers import Prompts
from lab.warmup.disagreement import Frame, Growth, grown

SOURCES = {
    "random": "token ids drawn alike",
    "disagree": "of those, the ones whose answer the students disagree on most (Dual Student)",
    "sampled": "what the students would say",
    "disputed": "of that, what they disagree on most",
    "own": "none: the target writes query and answer itself",
}
STUDENTS = {
    "random": 1,
    "disagree": 2,
    "sampled": 2,
    "disputed": 2,
    "own": 1,
}  # that a source needs
MARK = "¤"


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """As the model's chat template has it; without one a query stands behind whatever begins a text."""
    never = sorted(set(tokenizer.added_tokens_decoder))
    if not tokenizer.chat_template:
        first = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        return Frame([first], [], never)
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False
    )
    head, tail = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in whole.split(MARK)
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
    """`count` prompts, which the same seed and students always give."""
    if source == "own":
        return [list(frame.head) for _ in range(count)]
    growth = Growth(
        children=children if source in ("disagree", "disputed") else 1,
        sampled=source in ("sampled", "disputed"),
    )
    return [
        [*row, *frame.tail]
        for row in grown(students, frame, count, growth, vocab_size, seed).tolist()
    ]
