"""The queries of a replay: prompts of its domains, in the order of its segments."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lab.corpus import package_prompts
from lab.prompts import prompts_in, tokenize
from lab.replay.config import Replay
from online.messages import Query

POOL = 20_000  # prompts of a domain that a stream draws from, at most
PACKAGE_PROMPTS = 2000
SEEDS = 1_000_003  # between the queries' seeds of one stream's seed and those of the next


@dataclass(frozen=True, slots=True)
class StreamQuery:
    name: str
    domain: str
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int

    def query(self, route: str, max_tokens: int, **options: Any) -> Query:
        own = (self.name, route, self.prompt_ids, max_tokens, self.temperature)
        return Query(*own, seed=self.seed, **options)


def prompts(source: str, *, held_out: bool) -> list[str]:
    """The prompts of `package:NAME` or of a JSON-lines file.

    Raises:
        ValueError: the source can't be read or holds no prompts; it is named.
    """
    kind, _, rest = source.partition(":")
    if kind == "package":
        seed = 1 if held_out else 2
        return package_prompts(rest, PACKAGE_PROMPTS, held_out=held_out, seed=seed)
    return prompts_in(Path(source))


class PromptSource:
    """One domain's prompts as token ids, shuffled by the seed, from the start again at the end."""

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int, seed: int
    ) -> None:
        self._texts, self._tokenizer, self._longest = list(texts), tokenizer, longest
        random.Random(seed).shuffle(self._texts)
        del self._texts[POOL:]
        self._next = 0

    def take(self) -> tuple[int, ...]:
        """The next prompt; a very long one keeps its end, which the answer continues."""
        text = self._texts[self._next % len(self._texts)]
        self._next += 1
        return tuple(tokenize(self._tokenizer, text)[-self._longest :])


def stream(config: Replay, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[StreamQuery]:
    """The queries of all segments, the same for every arm of a seed."""
    sources = {
        name: PromptSource(
            prompts(domain.traffic, held_out=False), tokenizer, config.longest_prompt, seed
        )
        for name, domain in config.domains.items()
    }
    rng, before, number = random.Random(seed), None, 0
    for segment in config.segments:
        for i in range(segment.queries):
            weights = segment.weights(i, before)
            domain = rng.choices(list(weights), list(weights.values()))[0]
            temperature = 0.0 if rng.random() < config.greedy_share else 1.0
            name, prompt_ids = f"{domain}-{seed}-{number}", sources[domain].take()
            yield StreamQuery(name, domain, prompt_ids, temperature, seed * SEEDS + number)
            number += 1
        before = segment


def held_out_queries(
    domain: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    count: int,
    seed: int,
) -> list[StreamQuery]:
    """Held-out queries of a domain: all sampled, then the same ones greedy."""
    texts = prompts(source, held_out=True)
    if len(texts) < count:
        raise ValueError(f"held_out: {count} queries are asked for, but {source} has {len(texts)}")
    held_out = PromptSource(texts, tokenizer, longest, 0)
    ids = [held_out.take() for _ in range(count)]
    kinds = (("sampled", 1.0), ("greedy", 0.0))
    return [
        StreamQuery(f"held-out-{domain}-{kind}-{i}", domain, prompt, heat, seed * SEEDS + i)
        for kind, heat in kinds
        for i, prompt in enumerate(ids)
    ]
