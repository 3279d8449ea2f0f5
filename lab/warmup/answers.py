"""The target's answers to prompts, as signals: some to train on, others held out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lab import corpus, rig
from lab.options import PairOptions, option
from lab.output import say
from lab.prompts import read_prompts, tokenize
from lab.stored import stored
from online.messages import Query
from online.signals import Signal, decode
from trainer.examples import held_out, usable

AT_ONCE = 32  # queries answered together
BOTH = (0.0, 1.0)  # greedy and sampled in turn: the draft will serve both
SAMPLED = (1.0,)
Prompts = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(PairOptions):
    """A pair, and the held-out prompts that drafts are compared on."""

    max_tokens: int = option(96, "of an answer")
    held_out: Path | None = option(
        None, "prompts to compare on (default: one in five, or other files' code)"
    )
    held_out_count: int = option(100, "prompts taken from there")


def training_and_held_out(
    options: AnswerOptions, pair: rig.Pair, *, unprompted: bool = False
) -> tuple[list[Signal], list[Signal]]:
    """The target's answers to train on, and those to compare on."""
    # A greedy target without a prompt would write the same query every time.
    temperatures = SAMPLED if unprompted else BOTH
    prompts, others = pair.prompts, []
    if options.held_out:
        others = tokenized(pair, options.held_out, options.held_out_count)
    if options.prompts is None and not unprompted:
        # Cuts of one file share much of their text: train on cuts of other files.
        others = others or prompts[: options.held_out_count]
        package = corpus.held_out_packages()[0]
        texts = corpus.package_prompts(package, len(prompts), held_out=False, seed=2)
        prompts = [tokenize(pair.tokenizer, text) for text in texts]
    signals = answers(pair, prompts + others, options.max_tokens, temperatures=temperatures)
    ids = {f"q{i}" for i in range(len(prompts))}
    trains = [s.request_id in ids if others else not held_out(s) for s in signals]
    compared = [not each for each in trains]
    return list(itertools.compress(signals, trains)), list(itertools.compress(signals, compared))


def tokenized(pair: rig.Pair, path: Path, count: int) -> Prompts:
    tokenizer = pair.tokenizer
    return [tokenize(tokenizer, text) for text in read_prompts(path, count)]


def answers(
    pair: rig.Pair,
    prompts: Prompts,
    max_tokens: int,
    name: str = "q",
    seed: int = 0,
    temperatures: Sequence[float] = BOTH,
) -> list[Signal]:
    """The target's answers in the prompts' order, recorded as in the service.

    Prompts take the temperatures in turn. Answers that no draft can train on are left out.
    """
    queries = [
        Query(f"{name}{i}", rig.ROUTE, tuple(ids), max_tokens, heat, seed=seed + i, gamma=0)
        for i, (ids, heat) in enumerate(zip(prompts, itertools.cycle(temperatures)))
    ]
    asked = replace(pair, prompts=prompts)
    with rig.rig(asked, pair.files.draft, AT_ONCE, max_tokens=max_tokens) as serving:
        for at in range(0, len(queries), 8 * AT_ONCE):
            serving.complete(queries[at : at + 8 * AT_ONCE])
            say(f"answered {min(at + 8 * AT_ONCE, len(queries))} of {len(queries)}")
        # The step that ended the last answers has handed them to the recorder.
        serving.engine.between_steps(lambda: None).result()
        serving.parts.recorder.stop(60)
        signals = [decode(entry.record) for entry in stored(serving.buffer, rig.ROUTE)]
        vocab_size = serving.engine.batch.target.vocab_size
    # The engine's thread has ended: training takes its cores.
    torch.set_num_threads(pair.threads)
    by_id = {signal.request_id: signal for signal in signals if usable(signal, vocab_size)}
    return [by_id[query.id] for query in queries if query.id in by_id]


def output_tokens(signals: Sequence[Signal]) -> int:
    return sum(len(signal.output_ids) for signal in signals)
