"""Drafts swapped beneath a load."""

import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM

from decoder.engine.batch import Batch
from decoder.models.loading import ModelFiles
from lab import rig

INSTALL_LIMIT_S = 60.0


class StepClock:
    """How long each step of a batch takes; it replaces the batch's own `step`."""

    def __init__(self, batch: Batch) -> None:
        self.steps_s: list[float] = []
        self._step = batch.step
        batch.step = self  # type: ignore[method-assign]

    def __call__(self) -> None:
        began = time.perf_counter()
        self._step()
        self.steps_s.append(time.perf_counter() - began)


def swap(serving: rig.Rig, folder: Path, version: int) -> float:
    """Stages weights on this thread; the engine's installs them between two steps.

    `decoder/rollout/swapper.py` does the same. Returns the pause of the engine's thread, seconds.
    """
    draft = serving.engine.batch.drafts[rig.ROUTE]
    staged = draft.stage(folder)

    def install() -> float:
        began = time.perf_counter()
        draft.install(staged, version)
        return time.perf_counter() - began

    return serving.engine.between_steps(install).result(INSTALL_LIMIT_S)


def draft_folders(files: ModelFiles, folder: Path) -> Sequence[Path]:
    """A random draft and the pair's own, each as one safetensors file for `LiveDraft.stage`."""
    own = folder / "own"
    draft = AutoModelForCausalLM.from_pretrained(files.draft, dtype="auto")
    draft.save_pretrained(own, max_shard_size="1TB")
    return Path(rig.random_draft(files, folder / "random")), own
