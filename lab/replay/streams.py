"""What is asked, in which order: domains of prompts, and the segments in which they follow one another."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lab import traffic
from lab.replay.config import Domain, Segment
from lab.rig import prompts_in, tokenize

POOL = 20_000  # prompts of a domain that a stream draws from, at most


@dataclass(frozen=True, slots=True)
class Asked:
    """One query of a stream, before it is one of the engine's."""

    name: str
    domain: str
    prompt_ids: tuple[int, ...]
    temperature: float
    seed: int


def prompts(source: str, *, held_out: bool) -> list[str]:
    """The prompts of `package:NAME`, `hub:DATASET[:SPLIT[:FIELD]]` or a JSON-lines file with a "prompt" each.

    Raises:
        ValueError: the source can't be read, or holds no prompts; it is named.
    """
    kind, _, rest = source.partition(":")
    if kind == "package":
        return traffic.package_prompts(rest, 2000, held_out=held_out, seed=1 if held_out else 2)
    if kind == "hub":
        return _hub_prompts(*rest.split(":"))
    return prompts_in(Path(source))


def _hub_prompts(name: str, split: str = "train", field: str = "prompt") -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"hub:{name} needs the `datasets` package: pip install datasets"
        ) from error
    rows = datasets.load_dataset(name, split=split)
    if field not in rows.column_names:
        raise ValueError(
            f"hub:{name}:{split} has no field {field!r}; it has {', '.join(rows.column_names)}"
        )
    return [str(text) for text in rows[field]]


class Source:
    """One domain's prompts as token ids, in an order of the seed's own, begun anew when all are used."""

    def __init__(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int, seed: int
    ) -> None:
        self._texts, self._tokenizer, self._longest = list(texts), tokenizer, longest
        random.Random(seed).shuffle(self._texts)
        del self._texts[POOL:]
        self._next = 0

    def take(self) -> tuple[int, ...]:
        """The next prompt; of a very long one the end, which is what an answer follows."""
        text = self._texts[self._next % len(self._texts)]
        self._next += 1
        return tuple(tokenize(self._tokenizer, text)[-self._longest :])


class Stream:
    """The queries of all segments, the same for every arm of a seed."""

    def __init__(
        self,
        domains: Mapping[str, Domain],
        segments: Sequence[Segment],
        tokenizer: PreTrainedTokenizerBase,
        longest: int,
        greedy_share: float,
        seed: int,
    ) -> None:
        self._domains, self._segments = domains, segments
        self._tokenizer, self._longest, self._greedy_share, self._seed = (
            tokenizer,
            longest,
            greedy_share,
            seed,
        )

    def __iter__(self) -> Iterator[Asked]:
        rng, sources, before, number = random.Random(self._seed), self._sources(), None, 0
        for segment in self._segments:
            for i in range(segment.queries):
                weights = segment.weights(i, before)
                domain = rng.choices(list(weights), list(weights.values()))[0]
                temperature = 0.0 if rng.random() < self._greedy_share else 1.0
                seed = self._seed * 1_000_003 + number
                yield Asked(
                    f"{domain}-{self._seed}-{number}",
                    domain,
                    sources[domain].take(),
                    temperature,
                    seed,
                )
                number += 1
            before = segment

    def _sources(self) -> dict[str, Source]:
        return {
            name: Source(
                prompts(domain.traffic, held_out=False), self._tokenizer, self._longest, self._seed
            )
            for name, domain in self._domains.items()
        }


def exam(
    domain: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    count: int,
    seed: int,
) -> list[Asked]:
    """Held-out queries of a domain, each once sampled and once greedy."""
    texts = prompts(source, held_out=True)
    if len(texts) < count:
        raise ValueError(f"held_out: {count} queries are asked for, but {source} has {len(texts)}")
    held_out = Source(texts, tokenizer, longest, 0)
    ids = [held_out.take() for _ in range(count)]
    kinds = (("sampled", 1.0), ("greedy", 0.0))
    return [
        Asked(f"exam-{domain}-{kind}-{i}", domain, prompt, temperature, seed * 1_000_003 + i)
        for kind, temperature in kinds
        for i, prompt in enumerate(ids)
    ]
