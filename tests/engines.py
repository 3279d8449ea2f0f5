"""An engine over a tiny pair, and what a test needs to talk to it."""

import functools
import queue
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from decoder.engine.engine import Engine, EngineLimits
from decoder.models.loading import load_models, load_module, over_slots
from decoder.recording.observation import RecordLimits
from decoder.recording.recorder import Recorder
from decoder.rollout.live import LiveDraft
from online.buffer import BufferLimits
from online.memory_buffer import MemoryBuffer
from online.messages import Delta, Query, SpeculationStats
from online.metrics import ServiceMetrics
from online.signals import Signal, decode
from tests.device import DEVICE
from tests.tiny import VOCABULARY, TinyPair

CAPACITY = 257
SIZES = {
    "slots": 8,
    "max_waiting": 100,
    "max_context": CAPACITY - 1,
    "gamma": 4,
    "prefill_tokens": 64,
    "kept_contexts": 4,
}


@dataclass
class Listener:
    """Collects one sequence's deltas."""

    deltas: "queue.Queue[Delta]" = field(default_factory=queue.Queue)

    def __call__(self, delta: Delta) -> None:
        self.deltas.put(delta)

    def wait(self, timeout_s: float = 60) -> "Finished":
        text, ids, logprobs = "", [], []
        while True:
            delta = self.deltas.get(timeout=timeout_s)
            text += delta.text
            ids += delta.token_ids
            logprobs += delta.logprobs
            if delta.finish_reason:
                assert delta.stats is not None
                return Finished(text, ids, logprobs, delta.finish_reason, delta.stats, delta.error)


@dataclass(frozen=True)
class Finished:
    text: str
    ids: list[int]
    logprobs: list[object]
    reason: str
    stats: SpeculationStats
    error: str


@dataclass
class Bench:
    """An engine with its parts in reach."""

    engine: Engine
    buffer: MemoryBuffer
    metrics: ServiceMetrics
    recorder: Recorder
    tokenizer: PreTrainedTokenizerBase

    def submit(self, query: Query) -> Listener:
        listener = Listener()
        self.engine.submit(query, listener)
        return listener

    def signals(self, count: int, route: str = "default") -> list[Signal]:
        """The route's signals, once there are `count`. They are written after the last delta."""
        deadline = time.monotonic() + 10
        while self.buffer.depth(route).signals < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return [decode(entry.record) for entry in self.buffer.entries(route)[::-1]]

    def counter(self, name: str) -> float:
        """A metric's value so far."""
        return (
            self.metrics.registry.get_sample_value(f"{name}_total", {"model_name": "tiny"}) or 0.0
        )

    def run(self, *queries: Query) -> list[Finished]:
        return [listener.wait() for listener in [self.submit(query) for query in queries]]


def query(prompt: str | tuple[int, ...] = (40, 50, 60), name: str = "q", **more: object) -> Query:
    """γ is fixed: the tiny draft costs as much as the target, so the engine would not draft."""
    ids = prompt if isinstance(prompt, tuple) else tuple(ord(c) for c in prompt)
    return Query(
        **{
            "id": name,
            "route": "default",
            "prompt_ids": ids,
            "max_tokens": 24,
            "temperature": 0.0,
            "gamma": 4,
            **more,
        }
    )  # type: ignore[arg-type]


@functools.cache
def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as `transformers` runs it, which shares no code with the engine."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # type: ignore[no-any-return]


@functools.cache
def target_alone(pair: TinyPair, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Greedy by `transformers` itself."""
    out = reference(pair.target).generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False
    )
    return list(out[0, len(prompt) :].tolist())


def _live_drafts(
    routes: Mapping[str, Path], canary: Path | None, slots: int, dtype: str
) -> dict[str, LiveDraft]:
    """Over one cache, as in the service; here each route may begin with a draft of its own."""
    folders = [*routes.values(), *([canary] if canary else [])]
    modules = [load_module(folder, DEVICE, dtype) for folder in folders]
    models = over_slots(modules, slots, CAPACITY, VOCABULARY)
    live = {route: LiveDraft(route, model) for route, model in zip(routes, models, strict=False)}
    if canary is not None:
        first = next(iter(live.values()))
        first.canary, first.share = LiveDraft(first.route, models[-1]), 0.5
        first.version, first.canary.version = 1, 9
    return live


@contextmanager
def bench(
    pair: TinyPair,
    drafts: Mapping[str, Path] | None = None,
    target: object = None,
    dtype: str = "float32",
    canary: Path | None = None,
    branch_tokens: int = 16,
    **limits: int,
) -> Iterator[Bench]:
    """`canary`: drafts as version 9 for half of the first route's requests.

    `branch_tokens`: recorded of every rejected branch; by default all of it.
    """
    metrics = ServiceMetrics("tiny")
    buffer = MemoryBuffer(BufferLimits(10_000, 2**30, 3600))
    recorder = Recorder(buffer, "tiny-target", 1000, metrics)
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    sizes = {**SIZES, **limits}
    slots = sizes["slots"] + sizes["kept_contexts"]
    served = target or load_models(pair.target, 1, slots, CAPACITY, DEVICE, dtype)[0]
    live = _live_drafts(drafts or {"default": pair.draft}, canary, slots, dtype)
    engine = Engine(
        served,  # type: ignore[arg-type]
        live,
        tokenizer.backend_tokenizer,
        frozenset([0]),
        EngineLimits(**sizes, record=RecordLimits(16, branch_tokens)),
        recorder,
        metrics,
        frozenset(["closed"]),
        DEVICE,
    )
    recorder.start()
    engine.start()
    try:
        yield Bench(engine, buffer, metrics, recorder, tokenizer)
    finally:
        engine.stop()
        recorder.stop()
