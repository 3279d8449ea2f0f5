"""Rounds of drafters in one engine, with the work of the draft model counted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from decoder.models.base import LayeredModel
from decoder.models.hidden import HiddenStates
from lab.interleaved import Variant
from lab.replay.streams import StreamQuery
from lab.rig import ROUTE, Rig
from online.messages import DrafterName, Query

BEFORE = 8  # sequences in flight while earlier traffic is answered
R = TypeVar("R")


@dataclass(kw_only=True)
class Measured(Variant):
    computed: float = 0  # tokens that the draft model was fed
    forwards: float = 0  # of the draft model


class CountingRig:
    def __init__(self, serving: Rig, max_tokens: int) -> None:
        self._rig, self._max_tokens, self._rounds = serving, max_tokens, 0
        self._computed = self._forwards = 0.0
        model = serving.engine.batch.drafts[ROUTE].model
        model.forward = self._counted(model.forward, torch.Tensor.numel)  # type: ignore[method-assign]
        if isinstance(model, LayeredModel):  # early exits ask for layers one by one
            layer = 1 / model.num_layers
            model.run_layer = self._counted(model.run_layer, HiddenStates.numel, layer)  # type: ignore[method-assign]

    def run(self, variant: Measured, asked: Sequence[StreamQuery], at_once: int) -> None:
        """One round of a variant."""
        self._rounds += 1
        queries = [self._query(variant, each) for each in asked]
        computed, forwards, started = self._computed, self._forwards, time.perf_counter()
        answers = self._rig.complete(queries, at_once)
        seconds = time.perf_counter() - started
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{len(failed)} queries failed: {failed[0]}")
        variant.add(answers, seconds)
        variant.computed += self._computed - computed
        variant.forwards += self._forwards - forwards

    def answer(self, prompts: Sequence[tuple[int, ...]], drafter: DrafterName) -> None:
        """Answers earlier traffic, from which n-grams and the choice of drafters learn."""
        queries = [
            Query(
                id=f"before-{i}",
                route=ROUTE,
                prompt_ids=ids,
                max_tokens=self._max_tokens,
                temperature=float(i % 2),
                seed=i,
                drafter=drafter,
            )
            for i, ids in enumerate(prompts)
        ]
        self._rig.complete(queries, BEFORE)

    def _query(self, variant: Measured, asked: StreamQuery) -> Query:
        return Query(
            id=f"{self._rounds}-{asked.name}",
            route=ROUTE,
            prompt_ids=asked.prompt_ids,
            max_tokens=self._max_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            gamma=variant.gamma,
            drafter=variant.drafter,
            store=False,
        )

    def _counted(
        self, work: Callable[..., R], tokens: Callable[[Any], int], share: float = 1
    ) -> Callable[..., R]:
        """Counts the tokens fed to `share` of the draft's layers."""

        def counted(slots: Any, fed: Any, *more: Any) -> R:
            self._computed += share * tokens(fed)
            self._forwards += share
            return work(slots, fed, *more)

        return counted
