"""`python -m lab bench drafters`: every drafter and the chain, on real queries of several streams.

A few short rounds find how many tokens each drafter should draft. Then all run in interleaved
rounds on the same held-out queries, half sampled at T = 1 and half greedy. τ is tokens per target
forward; a target forward verifies the drafted tokens and the last one. Ratios are medians over
rounds, with 95 % bootstrap intervals. `exact_tv` is the total variation between a drafter's output
distribution and the target's, by enumeration.

A first draft that knows nothing of a stream shows little: give one that has learnt (--draft), with
masks for the drafters that need them. N-grams know earlier answers: --answered queries of every
stream's other traffic.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoder.device.placement import device_of
from decoder.models.loading import load_tokenizer
from lab import rig
from lab.bench.exactness import exact_tv
from lab.interleaved import TRIAL_ROUNDS, Variant, at_best_gamma, interleave, mixed, round_size
from lab.options import ModelOptions, option, parse
from lab.output import finish, table
from lab.replay.config import Domain
from lab.replay.presets import preset, shared_data, shared_pair
from lab.replay.streams import PromptSource, StreamQuery, held_out_queries, prompts
from online.messages import DrafterName, Query

FREE = None  # the engine's choice of γ before every step
GAMMAS: dict[DrafterName, tuple[int | None, ...]] = {
    "chain": (1, 2, 3, 4, 6, FREE),
    "tree": (2, 3, 4, 6, 9, 14),
    "ngrams": (2, 4, 8, FREE),
    "cascade": (4, 8, FREE),
    "graph": (2, 3, 4, 6, 9, 14),
    "parallel": (2, 3, 4, 5),
    "parallel_cascade": (4, 8, FREE),
    "exits": (1, 2, 3, 4, 6),
    "auto": (FREE,),
}
PLAIN = "plain"
LONGEST = 700  # tokens of a prompt
BEFORE = 8  # sequences in flight while earlier traffic is answered


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    data: Path | None = option(None, "folder with stream/DOMAIN.jsonl (default: ../shared/data)")
    target: str = option("", "folder or hub id (default: beside the data, else the embedded)")
    draft: str = option("", "folder or hub id; one that has learnt shows most")
    streams: tuple[str, ...] = option((), "of the data's domains (default: all)")
    drafters: tuple[DrafterName, ...] = option(tuple(GAMMAS), "besides the chain")
    at_once: tuple[int, ...] = option((1, 8), "sequences in flight")
    queries: int = option(16, "of a round; more with several sequences in flight")
    answered: int = option(300, "queries of every stream answered before")
    rounds: int = option(5, "of the comparison")
    max_tokens: int = option(96, "of an answer")

    @property
    def compared(self) -> list[DrafterName]:
        return [name for name in GAMMAS if name == "chain" or name in self.drafters]


def compare(
    serving: rig.Rig, asked: Sequence[StreamQuery], at_once: int, options: Options
) -> dict[str, Variant]:
    """All drafters, each with the γ that is fastest for it."""
    count = round_size(options.queries, at_once)
    run = partial(_run, serving, options.max_tokens)
    variants = {PLAIN: Variant(gamma=0)}
    for name in options.compared:
        gammas = GAMMAS[name]
        variants[name] = at_best_gamma(gammas, asked, count, at_once, run, drafter=name)
    interleave(list(variants.values()), asked, count, at_once, options.rounds, run)
    return variants


def _run(
    serving: rig.Rig,
    max_tokens: int,
    variant: Variant,
    asked: Sequence[StreamQuery],
    at_once: int,
) -> None:
    """One round of a variant."""
    own = {"gamma": variant.gamma, "drafter": variant.drafter, "store": False}
    queries = [each.query(rig.ROUTE, max_tokens, **own) for each in asked]
    started = time.perf_counter()
    answers = serving.complete(queries, at_once)
    variant.add(answers, time.perf_counter() - started)


def _answer(
    serving: rig.Rig, prompts: Sequence[tuple[int, ...]], drafter: DrafterName, max_tokens: int
) -> None:
    """Answers earlier traffic, from which n-grams and the choice of drafters learn."""
    queries = [
        Query(f"before-{i}", rig.ROUTE, ids, max_tokens, float(i % 2), seed=i, drafter=drafter)
        for i, ids in enumerate(prompts)
    ]
    serving.complete(queries, BEFORE)


def main() -> None:
    options = parse(Options, "bench drafters", __doc__)
    finish({"drafters": measure(options)})


def measure(options: Options) -> dict[str, Any]:
    domains, pair, asked = _inputs(options)
    exact = {name: exact_tv(name, device_of(options.device)) for name in options.compared}
    found: dict[str, Any] = {name: {} for name in options.compared}
    slots, tokens = max(BEFORE, *options.at_once), options.max_tokens
    with rig.rig(pair, pair.files.draft, slots, max_tokens=tokens, kept_contexts=0) as serving:
        learning: DrafterName = "auto" if "auto" in options.compared else "chain"
        _answer(serving, _traffic(domains, pair, options.answered), learning, tokens)
        for stream, at_once in product(asked, options.at_once):
            variants = compare(serving, asked[stream], at_once, options)
            figures = {name: _figures(variants, name) for name in variants}
            _table(f"{stream}, {at_once} at once", variants, figures)
            suffix = "" if at_once == 1 else f"_{at_once}"
            for name in options.compared:
                own = found[name].setdefault(stream, {"exact_tv": exact[name]})
                own |= {key + suffix: value for key, value in figures[name].items()}
    return found


def _inputs(options: Options) -> tuple[dict[str, Domain], rig.Pair, dict[str, list[StreamQuery]]]:
    """The domains, the pair, and each stream's held-out queries, sampled and greedy alternating."""
    data = shared_data(options.data)
    beside = shared_pair() if data else {}
    chosen = {name: getattr(options, name) or beside.get(name, "") for name in ("target", "draft")}
    files = rig.files_of(replace(options, **chosen))
    domains = preset("abrupt" if data else "embedded", data, 1).domains
    if unknown := set(options.streams) - set(domains):
        names = ", ".join(sorted(unknown))
        raise ValueError(f"--streams: {names} are not among {', '.join(domains)}")
    rounds = max(TRIAL_ROUNDS, 2 * options.rounds)
    count = rounds * round_size(options.queries, max(options.at_once)) // 4
    tokenizer = load_tokenizer(files)
    asked = {
        name: mixed(held_out_queries(name, domains[name].held_out, tokenizer, LONGEST, count, 1))
        for name in options.streams or domains
    }
    threads = options.threads or torch.get_num_threads()
    known = [list(query.prompt_ids) for queries in asked.values() for query in queries]
    return domains, rig.Pair(files, known, options.dtype, options.device, threads), asked


def _traffic(domains: Mapping[str, Domain], pair: rig.Pair, count: int) -> list[tuple[int, ...]]:
    """`count` prompts of every domain, none of them held out, in rotation."""
    texts = [prompts(domain.traffic, held_out=False) for domain in domains.values()]
    sources = [PromptSource(each, pair.tokenizer, LONGEST, 1) for each in texts]
    return [source.take() for _ in range(count) for source in sources]


def _figures(variants: Mapping[str, Variant], name: str) -> dict[str, Any]:
    variant = variants[name]
    compared = variant.figures(variants["chain"], variants[PLAIN])
    return {"gamma": variant.gamma, **compared}


def _table(title: str, variants: Mapping[str, Variant], figures: Mapping[str, Any]) -> None:
    head = ["drafter", "γ", "τ", "verified", "tokens/s", "over the chain", "over plain"]
    rows = [
        [
            name,
            "" if variant.gamma is None else variant.gamma,
            f"{figures[name]['tau']:.2f}",
            f"{figures[name]['verified_per_token']:.2f}",
            f"{np.median(variant.speeds):.1f}",
            variant.speed_over(variants["chain"]),
            variant.speed_over(variants[PLAIN]),
        ]
        for name, variant in variants.items()
    ]
    table(head, rows, title)
