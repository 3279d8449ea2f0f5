"""What `bench decode` compares: this engine and `transformers` with its modes of generation."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from decoder.device.placement import device_of, dtype_of, spread_over_cores, stay_on_one_core
from decoder.models.loading import end_ids
from lab import rig
from lab.rig import Pair
from online.messages import Query

# Of transformers' continuous batching: 256 tokens of one layer each. On a CPU it cannot measure
# the memory that is there.
PAGES = 1024
Prompts = list[list[int]]


@dataclass(frozen=True)
class Case:
    """A mode of answering prompts."""

    name: str
    at_once: int = 1
    sampled: bool = False
    gamma: int | None = None  # drafted tokens a step; None: the system's own choice
    drafts: bool = False


@dataclass(frozen=True)
class Outcome:
    tokens: int
    seconds: float
    steps: int = 0
    stepped_s: float = 0.0
    forward_s: float = 0.0  # of the steps' time, spent in the models' forwards

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def outside(self) -> float:
        """Share of the steps' time outside model forwards."""
        return 1 - self.forward_s / self.stepped_s

    def __add__(self, other: "Outcome") -> "Outcome":
        fields = zip(astuple(self), astuple(other), strict=True)
        return Outcome(*(own + theirs for own, theirs in fields))


class Generate:
    """`transformers.generate`: alone, assisted by the draft, or on a padded batch."""

    def __init__(self, pair: Pair, max_tokens: int) -> None:
        spread_over_cores(pair.threads)
        self._device, self._max_tokens = device_of(pair.device), max_tokens
        self._target = _load(pair, pair.files.target)
        self._draft = _load(pair, pair.files.draft)
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
        out = self._target.generate(
            torch.tensor(padded, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=self._max_tokens,
            eos_token_id=self._end or None,
            pad_token_id=0,
            **self._sampling(case),
            **self._assistance(case),
        )
        return sum(_length(ids, self._end) for ids in out[:, longest:].tolist())

    def _sampling(self, case: Case) -> dict[str, Any]:
        if not case.sampled:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def _assistance(self, case: Case) -> dict[str, Any]:
        if not case.drafts:
            return {}
        self._draft.generation_config.num_assistant_tokens = case.gamma
        self._draft.generation_config.num_assistant_tokens_schedule = "constant"
        self._draft.generation_config.assistant_confidence_threshold = 0.0
        return {"assistant_model": self._draft}


class Continuous:
    """`transformers`' continuous batching, whose loop has a thread of its own."""

    def __init__(self, pair: Pair, max_tokens: int) -> None:
        stay_on_one_core()  # the loop's thread inherits the setting made last, on the thread below
        self._target = _load(pair, pair.files.target)
        spreading = threading.Thread(target=spread_over_cores, args=(pair.threads,))
        spreading.start()
        spreading.join()
        self._end, self._max_tokens = sorted(end_ids(pair.files.target)), max_tokens

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        generation = GenerationConfig(
            max_new_tokens=self._max_tokens,
            eos_token_id=self._end or None,
            pad_token_id=0,
            do_sample=False,
        )
        batching = ContinuousBatchingConfig(
            max_requests_per_batch=case.at_once, num_blocks=PAGES, max_batch_tokens=512
        )
        started = time.perf_counter()
        out = self._target.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=batching,
            warmup=False,
            persistent_manager=True,
        )
        seconds = time.perf_counter() - started
        return Outcome(sum(len(answer.generated_tokens) for answer in out.values()), seconds)


class Ours:
    """This engine with one draft; all sequences of a case are in flight together."""

    def __init__(self, pair: Pair, max_tokens: int, draft: str, slots: int) -> None:
        self._opened, self._max_tokens, self._runs = ExitStack(), max_tokens, 0
        # No context is kept: every system computes every prompt.
        serving = rig.rig(pair, draft, slots, max_tokens=max_tokens, kept_contexts=0)
        self._rig = self._opened.enter_context(serving)
        self._forward, self._step = [0.0], [0.0]
        batch = self._rig.engine.batch
        for model in (batch.target, batch.drafts[rig.ROUTE].model):
            for name in ("forward", "encode"):
                setattr(model, name, _timed(getattr(model, name), self._forward))
        self._rig.engine.step = _timed(self._rig.engine.step, self._step)

    def run(self, case: Case, prompts: Prompts, seed: int) -> Outcome:
        forward, step = self._forward[0], self._step[0]
        self._runs += 1
        queries = [self._query(case, i, prompt, seed) for i, prompt in enumerate(prompts)]
        started = time.perf_counter()
        answers = self._rig.complete(queries, case.at_once)
        seconds = time.perf_counter() - started
        tokens = sum(len(answer.ids) for answer in answers)
        steps = sum(answer.stats.steps for answer in answers)
        return Outcome(tokens, seconds, steps, self._step[0] - step, self._forward[0] - forward)

    def _query(self, case: Case, number: int, prompt: list[int], seed: int) -> Query:
        return Query(
            id=f"{self._runs}-{number}",
            route=rig.ROUTE,
            prompt_ids=tuple(prompt),
            max_tokens=self._max_tokens,
            temperature=float(case.sampled),
            seed=seed + number,
            gamma=None if case.drafts else 0,
            store=False,
        )


def _load(pair: Pair, source: str) -> Any:
    device = device_of(pair.device)
    dtype = dtype_of(pair.dtype, device)
    load = AutoModelForCausalLM.from_pretrained
    return load(source, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def _timed(work: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*args, **more)
        finally:
            total[0] += time.perf_counter() - started

    return timed


def _length(ids: list[int], end: list[int]) -> int:
    """Generated tokens of a padded answer, its end token included."""
    return next((i + 1 for i, token in enumerate(ids) if token in end), len(ids))
