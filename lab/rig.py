"""A pair, its prompts, and an engine over it in this process: what benchmarks and offline distillation share."""

import argparse
import json
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from decoder.device.placement import device_of, prefill_tokens, stay_on_one_core
from decoder.engine.engine import Engine, EngineLimits
from decoder.models.loading import ModelFiles, end_ids, load_models, load_tokenizer
from decoder.recording.observation import RecordLimits
from decoder.recording.recorder import Recorder
from decoder.rollout.live import LiveDraft
from lab import corpus
from online.buffer import BufferLimits, SignalBuffer
from online.memory_buffer import MemoryBuffer
from online.messages import Delta, Query, SpeculationStats
from online.metrics import ServiceMetrics
from online.settings import Settings

ROUTE = "default"
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
    parser.add_argument(
        "--target", default="", help="folder or hub id (default: the embedded target)"
    )
    parser.add_argument(
        "--draft", default="", help="folder or hub id (default: the embedded draft)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help='JSON lines with a "prompt" each, sent as chat where there is a template (default: code of a package)',
    )
    parser.add_argument(
        "--prompt-count",
        type=int,
        default=200,
        help="prompts taken from the file (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="for every contestant",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="torch threads of every contestant (default: torch's)",
    )


def files_of(args: argparse.Namespace) -> ModelFiles:
    return ModelFiles.of(Settings(target=args.target, draft=args.draft))


def pair_of(args: argparse.Namespace) -> Pair:
    files = files_of(args)
    tokenizer = load_tokenizer(files)
    prompts = [tokenize(tokenizer, text) for text in read_prompts(args.prompts, args.prompt_count)]
    return Pair(files, prompts, args.dtype, args.device, args.threads or torch.get_num_threads())


def read_prompts(path: Path | None, count: int) -> list[str]:
    """Raises ValueError, naming the line, where the file does not hold prompts."""
    if path is None:
        return corpus.package_prompts(corpus.held_out_packages()[0], count, held_out=True, seed=1)
    found = prompts_in(path)
    return found[:: max(1, len(found) // count)][
        :count
    ]  # all over the file, which may be in some order


def prompts_in(path: Path) -> list[str]:
    """Every "prompt" of a JSON-lines file.

    Raises:
        ValueError: it can't be read, or a line holds no prompt (it is named).
    """
    try:
        lines = path.read_text().rstrip("\n").split("\n")  # prompts may hold other ends of lines
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


def dealt(asked: Sequence[R], count: int, turn: int) -> list[R]:
    """What a turn asks: the next ones after the turn before, from the start again when all have been asked."""
    return [asked[(turn * count + i) % len(asked)] for i in range(count)]


def random_draft(files: ModelFiles, folder: Path) -> str:
    """A draft of the pair's own shape that knows nothing."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(files.draft)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    stats: SpeculationStats
    arrivals_s: list[float]  # of every delta with tokens, since it was sent
    error: str = ""


class Rig:
    """An engine and the parts around it. `complete` sends queries and waits for their answers."""

    def __init__(
        self, engine: Engine, recorder: Recorder, buffer: SignalBuffer, metrics: ServiceMetrics
    ) -> None:
        self.engine, self.recorder, self.buffer, self.metrics = engine, recorder, buffer, metrics

    def complete(self, queries: Sequence[Query], at_once: int = 0) -> list[Answer]:
        """Answers in the queries' order; `at_once` of them in flight, as one ends the next is sent (0: all)."""
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
    clusters: Sequence[str] = (),
    settings: Settings | None = None,
) -> Iterator[Rig]:
    """An engine that is up and has timed its models.

    `draft` is a folder or hub id, and every route begins with it; γ at most is the service's own; signals stay in
    memory unless a `buffer` is given. `clusters` are routes that are parts of the first one.
    """
    settings, device = settings or Settings(), device_of(pair.device)
    threads = torch.get_num_threads()
    stay_on_one_core()
    metrics = ServiceMetrics(pair.files.name)
    buffer = buffer or MemoryBuffer(BufferLimits(10**6, 2**34, 7 * 86400))
    recorder = Recorder(buffer, "lab", 4096, metrics, dict.fromkeys(clusters, routes[0]))
    max_context = max(map(len, pair.prompts)) + max_tokens
    kept = settings.kept_contexts if kept_contexts is None else kept_contexts
    size = slots + kept, max_context + 1
    (target,) = load_models(pair.files.target, 1, *size, device, pair.dtype)
    served = (*routes, *clusters)
    models = load_models(draft, len(served), *size, device, pair.dtype, target.vocab_size)
    drafts = {route: LiveDraft(route, model) for route, model in zip(served, models, strict=True)}
    for route in clusters:
        drafts[route].follow(drafts[routes[0]])
    limits = EngineLimits(
        slots=slots,
        kept_contexts=kept,
        gamma=gamma or settings.gamma,
        prefill_tokens=settings.prefill_tokens or prefill_tokens(device),
        record=RecordLimits(settings.signal_top_k, settings.branch_tokens),
        max_waiting=10**6,
        max_context=max_context,
        threads=pair.threads,
    )
    engine = Engine(
        target,
        drafts,
        pair.tokenizer.backend_tokenizer,
        end_ids(pair.files.target),
        limits,
        recorder,
        metrics,
        device=device,
    )
    recorder.start()
    engine.start()
    try:
        yield Rig(engine, recorder, buffer, metrics)
    finally:
        engine.stop()
        recorder.stop()
        torch.set_num_threads(threads)  # the engine's thread has ended
