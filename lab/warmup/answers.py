"""The target's answers to prompts, as signals: what a draft learns from, and what it is held to."""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lab import corpus, rig
from lab.prompts import read_prompts, tokenize
from lab.stored import stored
from lab.warmup.options import say
from online.messages import Query
from online.signals import Signal, decode
from trainer.examples import held_out, usable

AT_ONCE = 32  # queries answered together
BOTH = (0.0, 1.0)  # greedy and sampled traffic in turn: the draft will serve both
SAMPLED = (1.0,)
Prompts = list[list[int]]


def training_and_held_out(
    args: argparse.Namespace, pair: rig.Pair, temperatures: Sequence[float] = BOTH
) -> tuple[list[Signal], list[Signal]]:
    """The target's answers to train on, and those to compare on."""
    prompts = pair.prompts
    others = tokenized(pair, args.held_out, args.held_out_count) if args.held_out else []
    if args.prompts is None and not getattr(args, "unprompted", False):
        # Cuts of one file share much of their text: train on cuts of other files.
        others = others or prompts[: args.held_out_count]
        package = corpus.held_out_packages()[0]
        texts = corpus.package_prompts(package, len(prompts), held_out=False, seed=2)
        prompts = [tokenize(pair.tokenizer, text) for text in texts]
    signals = answers(pair, prompts + others, args.max_tokens, temperatures=temperatures)
    if others:
        ids = {f"q{i}" for i in range(len(prompts))}
        return _split(signals, [s.request_id in ids for s in signals])
    return _split(signals, [not held_out(s) for s in signals])


def _split(signals: list[Signal], first: list[bool]) -> tuple[list[Signal], list[Signal]]:
    trains = list(itertools.compress(signals, first))
    return trains, list(itertools.compress(signals, [not one for one in first]))


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
    gamma: int | None = 0,
) -> list[Signal]:
    """The target's answers in the prompts' order, recorded as in the service.

    Prompts take the temperatures in turn. Answers that no draft can train
    on are left out. γ None: the engine chooses.
    """
    queries = [
        Query(f"{name}{i}", rig.ROUTE, tuple(ids), max_tokens, heat, seed=seed + i, gamma=gamma)
        for i, (ids, heat) in enumerate(zip(prompts, itertools.cycle(temperatures)))
    ]
    started, files = time.monotonic(), pair.files
    asked = replace(pair, prompts=prompts)
    with rig.rig(asked, files.draft, AT_ONCE, max_tokens=max_tokens) as serving:
        for at in range(0, len(queries), 8 * AT_ONCE):
            serving.complete(queries[at : at + 8 * AT_ONCE])
            done = min(at + 8 * AT_ONCE, len(queries))
            say(f"answered {done} of {len(queries)}, {time.monotonic() - started:.0f} s")
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
