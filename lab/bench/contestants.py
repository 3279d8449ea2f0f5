"""Who takes part in `bench decode`: `transformers` in its ways of generating, and this engine.

Each contestant lives in a process of its own, so that none shares torch's threads, caches or garbage with another.
"""

import multiprocessing
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from decoder.device.placement import device_of, dtype_of, spread_over_cores, stay_on_one_core
from decoder.models.loading import end_ids
from lab import rig
from lab.rig import Pair
from online.messages import Query

PAGES = 1024  # of transformers' continuous batching, 256 tokens of one layer each; it can't see how much a CPU has
Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """One way to answer some prompts."""

    name: str
    at_once: int = 1
    sampled: bool = False
    gamma: int | None = None  # drafted tokens a step; None: the contestant's own choice
    drafts: bool = False


@dataclass(frozen=True)
class Outcome:
    tokens: int
    seconds: float
    steps: int = 0
    stepped_s: float = 0.0
    forward_s: float = 0.0  # of the steps' time, what models' forwards took

    @property
    def outside(self) -> float:
        """Share of the steps' time that is not model forwards."""
        return 1 - self.forward_s / self.stepped_s

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            *(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))
        )


class Generate:
    """`transformers.generate`: alone, assisted by the draft, or on a padded batch."""

    def __init__(self, pair: Pair, max_tokens: int) -> None:
        spread_over_cores(pair.threads)
        self._device, self._max_tokens = device_of(pair.device), max_tokens
        self._target, self._draft = _load(pair, pair.files.target), _load(pair, pair.files.draft)
        self._end = sorted(end_ids(pair.files.target))

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        torch.manual_seed(seed)
        started, tokens = time.perf_counter(), 0
        for at in range(0, len(prompts), case.at_once):
            tokens += self._answer(case, prompts[at : at + case.at_once])
        return Outcome(tokens, time.perf_counter() - started)

    def _answer(self, case: Case, prompts: Prompts) -> int:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        more: dict[str, Any] = (
            {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
            if case.sampled
            else {}
        )
        if case.drafts:
            self._draft.generation_config.num_assistant_tokens = case.gamma
            self._draft.generation_config.num_assistant_tokens_schedule = "constant"
            self._draft.generation_config.assistant_confidence_threshold = 0.0
            more["assistant_model"] = self._draft
        out = self._target.generate(
            torch.tensor(padded, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=self._max_tokens,
            eos_token_id=self._end or None,
            pad_token_id=0,
            **{"do_sample": False, **more},
        )
        return sum(_length(row, self._end) for row in out[:, longest:].tolist())


class Continuous:
    """`transformers`' continuous batching, whose loop runs on a thread of its own."""

    def __init__(self, pair: Pair, max_tokens: int) -> None:
        stay_on_one_core()  # the loop's thread takes over what the last thread asked for, below
        self._target = _load(pair, pair.files.target)
        _on_a_thread(lambda: spread_over_cores(pair.threads))
        self._end, self._max_tokens = sorted(end_ids(pair.files.target)), max_tokens

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        started = time.perf_counter()
        out = self._target.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=self._max_tokens,
                eos_token_id=self._end or None,
                pad_token_id=0,
                do_sample=False,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=case.at_once, num_blocks=PAGES, max_batch_tokens=512
            ),
            warmup=False,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - started
        return Outcome(sum(len(answer.generated_tokens) for answer in out.values()), seconds)


class Ours:
    """This engine, with one draft. All sequences of a case are in flight together."""

    def __init__(self, pair: Pair, max_tokens: int, draft: str, slots: int) -> None:
        self._opened, self._max_tokens, self._counted = ExitStack(), max_tokens, 0
        # No context is kept: every prompt is computed, as the others compute it.
        self._rig = self._opened.enter_context(
            rig.rig(pair, draft, slots, max_tokens=max_tokens, kept_contexts=0)
        )
        self._forward, self._step = [0.0], [0.0]
        batch = self._rig.engine.batch
        for model in (batch.target, batch.drafts[rig.ROUTE].model):
            for name in ("forward", "encode"):
                setattr(model, name, _timed(getattr(model, name), self._forward))
        self._rig.engine.step = _timed(self._rig.engine.step, self._step)

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        forward, step, steps, tokens = self._forward[0], self._step[0], 0, 0
        self._counted += 1
        queries = [
            Query(
                id=f"{self._counted}-{i}",
                route=rig.ROUTE,
                prompt_ids=tuple(prompt),
                max_tokens=self._max_tokens,
                temperature=float(case.sampled),
                seed=seed + i,
                gamma=None if case.drafts else 0,
                store=False,
            )
            for i, prompt in enumerate(prompts)
        ]
        started = time.perf_counter()
        for answer in self._rig.complete(queries, case.at_once):
            tokens, steps = tokens + len(answer.ids), steps + answer.stats.steps
        seconds = time.perf_counter() - started
        return Outcome(tokens, seconds, steps, self._step[0] - step, self._forward[0] - forward)


class Contestant:
    """One of the above in a process of its own."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self._process.start()
        self._answer()

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        self._pipe.send((case, prompts, seed))
        outcome: Outcome = self._answer()
        return outcome

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contestant's process ended; what it said is above") from None


def _serve(pipe: Connection, make: Callable[..., Any], args: tuple[Any, ...]) -> None:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    contestant = make(*args)
    pipe.send("ready")
    while True:
        pipe.send(contestant.run(*pipe.recv()))


def _load(pair: Pair, source: str) -> Any:
    device = device_of(pair.device)
    module = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype_of(pair.dtype, device), attn_implementation="sdpa"
    )
    return module.to(device).eval()


def _timed(work: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **more)
        finally:
            total[0] += time.perf_counter() - started

    return timed


def _on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def _length(ids: list[int], end: list[int]) -> int:
    """Generated tokens of a padded row, the one that ends it included."""
    return next((i + 1 for i, token in enumerate(ids) if token in end), len(ids))
