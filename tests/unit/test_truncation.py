"""The lab's study of what has to be logged of a distribution."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lab import truncation
from lab.statistics import Floats
from lab.truncation import draws_for, gain_kept, sampled, truncated, whole_distribution
from lab.warmup.exam import Marks
from tests.signals import taught
from tests.tiny import TinyPair
from tests.unit.conftest import Command
from trainer.batches import Lesson, collate
from trainer.distill import draft_logits
from trainer.divergences import draft_classes, forward_kl


@pytest.fixture(scope="module")
def whole(pair: TinyPair) -> list[Floats]:
    target = AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32)
    return [whole_distribution(target, signal) for signal in taught(pair.target, 3)]


def test_all_tokens_are_the_whole_distribution(pair: TinyPair, whole: list[Floats]) -> None:
    """With k = V nothing is left over, and the loss is KL over the vocabulary; with less, what is cut is the rest."""
    signal, logp_NV = taught(pair.target, 3)[0], whole[0]
    assert np.allclose(np.exp(logp_NV).sum(1), 1, atol=1e-5)
    everything, some = truncated(signal, logp_NV, logp_NV.shape[1]), truncated(signal, logp_NV, 3)
    assert everything.rest_mass.max() < 1e-5
    assert np.allclose(some.rest_mass + np.exp(some.top_logp).sum(1), 1, atol=1e-5)
    module = AutoModelForCausalLM.from_pretrained(pair.spoilt, dtype=torch.float32)
    batch = collate([Lesson.of(everything)], 3, "cpu")
    with torch.inference_mode():
        logits_NV = draft_logits(module, batch)
        found_N = forward_kl(batch.truth.classes_NC, draft_classes(logits_NV, batch.truth.ids_NK))
        p_NV, q_NV = torch.from_numpy(logp_NV), logits_NV.log_softmax(-1)
    assert torch.allclose(found_N, (p_NV.exp() * (p_NV - q_NV)).sum(-1), atol=1e-4)


def test_sampled_tokens_are_unbiased(pair: TinyPair, whole: list[Floats]) -> None:
    """Over many samples the shares are the probabilities; of one, no more tokens are kept than were drawn."""
    signal, p_NV = taught(pair.target, 3)[0], np.exp(whole[0])
    total_NV = np.zeros_like(p_NV, np.float64)
    for seed in range(400):
        (drawn,) = sampled([signal], whole[:1], 8, seed)
        share_NK = np.exp(drawn.top_logp.astype(np.float64))
        assert np.allclose(share_NK.sum(1), 1, atol=1e-5)
        np.add.at(total_NV, (np.arange(len(p_NV))[:, None], drawn.top_ids), share_NK)
    assert drawn.top_ids.shape[1] <= 8
    assert np.abs(total_NV / 400 - p_NV).max() < 0.05


def test_draws_are_as_many_as_fit(whole: list[Floats]) -> None:
    """More distinct tokens need more draws; one draw hits one token."""
    few, more = draws_for(whole, 2), draws_for(whole, 4)
    assert 2 <= few < more
    assert draws_for(whole, 1) == 1


def test_gain_kept_is_a_share_of_the_whole_gain() -> None:
    """Half of it here."""
    first, all_, half = (
        Marks(np.full(8, tokens), np.zeros(8), np.zeros(8)) for tokens in (1.0, 2.0, 1.5)
    )
    assert gain_kept(first, all_, half) == pytest.approx([0.5] * 3)
    assert gain_kept(all_, first, half) == [], "there was none"


def test_the_command_ends_with_its_figures(command: Command, pair: TinyPair) -> None:
    """A row for every k, the whole vocabulary among them."""
    figures = command(
        truncation.main,
        "--draft",
        str(pair.spoilt),
        "--top-k",
        "2",
        "--sampled",
        "2",
        "--seeds",
        "1",
    )
    whole, top, drawn = figures["rows"]
    assert (whole, top) == ("whole", "top 2")
    assert drawn.endswith("draws")
    assert figures["rows"]["whole"]["gain_kept"] in ([1, 1, 1], [])
    assert figures["rows"]["top 2"]["bytes"] == 10
