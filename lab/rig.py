"""A pair, its prompts, and an engine over it in this process: for benchmarks and distillation."""

import argparse
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from decoder.assembly import DecoderParts, assemble
from decoder.engine.engine import Engine
from decoder.models.loading import ModelFiles, load_tokenizer
from lab.prompts import read_prompts, tokenize
from online.buffer import BufferLimits, SignalBuffer
from online.memory_buffer import MemoryBuffer
from online.messages import Delta, Query, SpeculationStats
from online.metrics import ServiceMetrics
from online.settings import Settings

ROUTE = "default"
QUEUE_SIZE = 4096  # finished requests that wait for the recorder: none may be lost here
DTYPES = ("auto", "float32", "bfloat16", "float16")
R = TypeVar("R")


@dataclass(frozen=True)
class Pair:
    """A target, a draft and prompts for them."""

    files: ModelFiles
    prompts: list[list[int]]
    dtype: str
    device: str
    threads: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", default="", help="folder or hub id (default: the embedded target)")
    add("--draft", default="", help="folder or hub id (default: the embedded draft)")
    add(
        "--prompts",
        type=Path,
        help='JSON lines with a "prompt" each, sent as chat where there is a template '
        "(default: code of a package)",
    )
    add(
        "--prompt-count",
        type=int,
        default=200,
        help="prompts taken from the file (default: %(default)s)",
    )
    add("--dtype", default="auto", choices=DTYPES, help="for every contestant")
    add("--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)")
    add("--threads", type=int, default=0, help="torch threads of each (default: torch's)")


def files_of(args: argparse.Namespace) -> ModelFiles:
    return ModelFiles.of(Settings(target=args.target, draft=args.draft))


def pair_of(args: argparse.Namespace) -> Pair:
    files = files_of(args)
    tokenizer = load_tokenizer(files)
    prompts = [tokenize(tokenizer, text) for text in read_prompts(args.prompts, args.prompt_count)]
    return Pair(files, prompts, args.dtype, args.device, args.threads or torch.get_num_threads())


def dealt(asked: Sequence[R], count: int, turn: int) -> list[R]:
    """The `count` items of a turn: they follow those of the turn before, in a circle."""
    return [asked[(turn * count + i) % len(asked)] for i in range(count)]


def random_draft(files: ModelFiles, folder: Path) -> str:
    """Saves a draft of the pair's own shape with random weights; returns its folder."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(files.draft)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    stats: SpeculationStats
    arrivals_s: list[float]  # from the query to every delta with tokens
    error: str = ""


@dataclass(frozen=True)
class Rig:
    """An engine that is running, and the parts around it."""

    parts: DecoderParts
    buffer: SignalBuffer

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    @property
    def metrics(self) -> ServiceMetrics:
        return self.parts.metrics

    def complete(self, queries: Sequence[Query], at_once: int = 0) -> list[Answer]:
        """Answers in the queries' order. `at_once`: queries in flight at a time (0: all)."""
        inbox: queue.SimpleQueue[tuple[int, float, Delta]] = queue.SimpleQueue()
        sent: list[float] = []

        def send() -> None:
            i = len(sent)
            sent.append(time.perf_counter())
            self.engine.submit(queries[i], lambda delta: inbox.put((i, time.perf_counter(), delta)))

        for _ in range(min(at_once or len(queries), len(queries))):
            send()
        ids: list[list[int]] = [[] for _ in queries]
        arrivals: list[list[float]] = [[] for _ in queries]
        answers: dict[int, Answer] = {}
        while len(answers) < len(queries):
            i, now, delta = inbox.get()
            ids[i] += delta.token_ids
            if delta.token_ids:
                arrivals[i].append(now - sent[i])
            if delta.finish_reason is not None:
                assert delta.stats is not None
                answers[i] = Answer(ids[i], delta.stats, arrivals[i], delta.error)
                if len(sent) < len(queries):
                    send()
        return [answers[i] for i in range(len(queries))]


@contextmanager
def rig(
    pair: Pair,
    draft: str,
    slots: int,
    *,
    gamma: int = 0,
    max_tokens: int = 256,
    kept_contexts: int | None = None,
    routes: Sequence[str] = (ROUTE,),
    buffer: SignalBuffer | None = None,
    clusters: int = 0,
    settings: Settings | None = None,
) -> Iterator[Rig]:
    """An engine that is running and has measured its step times.

    `draft` is a folder or hub id, which every route begins with. γ is at most that of `settings`,
    unless `gamma` is given. Signals stay in memory without a `buffer`. `clusters` counts the
    clusters of the first route.
    """
    settings = settings or Settings()
    own = {
        "slots": slots,
        "kept_contexts": settings.kept_contexts if kept_contexts is None else kept_contexts,
        "gamma": gamma or settings.gamma,
        "routes": tuple(routes),
        "learnt_routes": clusters,
        "closed_routes": (),
        "canary_share": 0.0,
        "max_waiting": 10**6,
        "device": pair.device,
        "dtype": pair.dtype,
        "threads": pair.threads,
    }
    files = replace(pair.files, draft=draft)
    buffer = buffer or MemoryBuffer(BufferLimits(10**6, 2**34, 7 * 86400))
    max_context = max(map(len, pair.prompts)) + max_tokens
    threads = torch.get_num_threads()
    parts = assemble(settings.model_copy(update=own), files, buffer, max_context, QUEUE_SIZE)
    parts.recorder.start()
    parts.engine.start()
    try:
        yield Rig(parts, buffer)
    finally:
        parts.engine.stop()
        parts.recorder.stop()
        torch.set_num_threads(threads)  # the engine's thread has ended
