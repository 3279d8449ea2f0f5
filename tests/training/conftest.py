"""What tests of the training share: answers of the target, drafts, and short rehearsals."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import trainer.rehearsal
from online.signals import Signal
from tests.signals import taught
from tests.tiny import TinyPair


@pytest.fixture(scope="session")
def answers(pair: TinyPair) -> list[Signal]:
    """Requests that the target answered."""
    return taught(pair.target, 160)


@pytest.fixture
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short samples: they are most of the time of a short training."""
    monkeypatch.setattr(trainer.rehearsal, "SAMPLES", 4)
    monkeypatch.setattr(trainer.rehearsal, "TOKENS", 8)


def load(folder: Path) -> torch.nn.Module:
    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module
