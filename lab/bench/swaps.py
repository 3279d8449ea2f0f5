"""Drafts swapped beneath a load, and what the steps around a swap take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from decoder.engine.batch import Batch
from decoder.models.loading import ModelFiles
from lab import rig
from lab.statistics import Floats

INSTALL_LIMIT_S = 60.0


class StepClock:
    """When each step of a batch began and ended; it replaces the batch's own `step`."""

    def __init__(self, batch: Batch) -> None:
        self.spans: list[tuple[float, float]] = []
        self._step = batch.step
        batch.step = self  # type: ignore[method-assign]

    def __call__(self) -> None:
        began = time.perf_counter()
        self._step()
        self.spans.append((began, time.perf_counter()))


@dataclass(frozen=True)
class Swap:
    """When the engine's thread was busy with the installation of a draft."""

    began_s: float
    ended_s: float

    @property
    def pause_s(self) -> float:
        return self.ended_s - self.began_s


def swap(serving: rig.Rig, folder: Path, version: int) -> Swap:
    """Stages weights on this thread; the engine's installs them between two steps.

    `decoder/rollout/swapper.py` does the same.
    """
    draft = serving.engine.batch.drafts[rig.ROUTE]
    staged = draft.stage(folder)

    def install() -> Swap:
        began = time.perf_counter()
        draft.install(staged, version)
        return Swap(began, time.perf_counter())

    return serving.engine.between_steps(install).result(INSTALL_LIMIT_S)


def draft_folders(files: ModelFiles, folder: Path) -> Sequence[Path]:
    """A random draft and the pair's own, each as one safetensors file for `LiveDraft.stage`."""
    own = folder / "own"
    draft = AutoModelForCausalLM.from_pretrained(files.draft, dtype="auto")
    draft.save_pretrained(own, max_shard_size="1TB")
    return Path(rig.random_draft(files, folder / "random")), own


def gaps(ends: Floats, swaps: Sequence[Swap]) -> tuple[list[float], list[float]]:
    """Times between the ends of two steps: those that contain a swap, and the others."""
    after = np.searchsorted(ends, [each.began_s for each in swaps])
    with_swap = {int(i) - 1 for i in after if 0 < i < len(ends)}
    sides: tuple[list[float], list[float]] = ([], [])
    for i, seconds in enumerate(np.diff(ends)):
        sides[i not in with_swap].append(float(seconds))
    return sides
