"""Prompts for benchmarks and distillation: from a file, or from the code of a package."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lab import corpus


def read_prompts(path: Path | None, count: int) -> list[str]:
    """`count` prompts from all over the file, whose order may mean something.

    Raises:
        ValueError: the file can't be read, or holds a line without a prompt.
    """
    if path is None:
        return corpus.package_prompts(corpus.held_out_packages()[0], count, held_out=True, seed=1)
    found = prompts_in(path)
    return found[:: max(1, len(found) // count)][:count]


def prompts_in(path: Path) -> list[str]:
    """Every "prompt" of a JSON-lines file.

    Raises:
        ValueError: it can't be read, or a line holds no prompt (it is named).
    """
    try:
        # Not splitlines: prompts may hold other line ends.
        lines = path.read_text().rstrip("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: not a JSON object with a "prompt": {error}'
            ) from error
    return prompts


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
