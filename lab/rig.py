"""A pair, its prompts, and an engine over it in this process: for benchmarks and distillation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from decoder.assembly import DecoderParts, assemble
from decoder.engine.engine import Engine
from decoder.models.loading import ModelFiles, load_tokenizer
from lab.options import ModelOptions, PairOptions
from lab.prompts import read_prompts, tokenize
from lab.streams import Load, Stream
from online.buffer import BufferLimits, SignalBuffer
from online.memory_buffer import MemoryBuffer
from online.messages import Query
from online.metrics import ServiceMetrics
from online.settings import Settings

ROUTE = "default"
SILENCE_S = 600.0  # without a token; a large model may take long
QUEUE_SIZE = 4096  # finished requests that wait for the recorder: none may be lost here


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


def files_of(options: ModelOptions) -> ModelFiles:
    # Bars of loading would interleave with the commands' own lines.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return ModelFiles.of(Settings(target=options.target, draft=options.draft))


def pair_of(options: PairOptions) -> Pair:
    files = files_of(options)
    tokenizer = load_tokenizer(files)
    texts = read_prompts(options.prompts, options.prompt_count)
    prompts = [tokenize(tokenizer, text) for text in texts]
    threads = options.threads or torch.get_num_threads()
    return Pair(files, prompts, options.dtype, options.device, threads)


def random_draft(files: ModelFiles, folder: Path) -> str:
    """Saves a draft of the pair's own shape with random weights; returns its folder."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(files.draft)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


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

    def complete(self, queries: Sequence[Query], at_once: int = 0) -> list[Stream]:
        """Answers in the queries' order. `at_once`: queries in flight at a time (0: all).

        Raises:
            RuntimeError: a query failed, or was never answered.
        """
        load = Load(self.engine, at_once or len(queries), silence_s=SILENCE_S)
        failed = [stream for stream in load.run(iter(queries)) if not stream.answered]
        if failed:
            reason = failed[0].error or "no answer"
            raise RuntimeError(f"{len(failed)} of {len(queries)} queries failed: {reason}")
        return load.sent


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
