"""The gate on real models: only a better draft passes."""

import torch
from transformers import AutoModelForCausalLM

from tests.signals import taught
from tests.tiny import TinyPair
from trainer.gate import compare_drafts


def load(folder: object) -> torch.nn.Module:
    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module


def test_a_better_draft_is_promoted_and_a_worse_one_refused(pair: TinyPair) -> None:
    """The good draft against the spoilt one, both ways round, and against itself."""
    good, spoilt = load(pair.draft), load(pair.spoilt)
    held_out_set = taught(pair.target, 30)
    better = compare_drafts(spoilt, good, held_out_set, gamma=4, pad_id=3)
    assert better.promote
    assert better.gain_low > 0
    assert better.candidate_acceptance > better.active_acceptance
    worse = compare_drafts(good, spoilt, held_out_set, gamma=4, pad_id=3)
    assert not worse.promote
    assert worse.reason.startswith("worse")
    same = compare_drafts(good, good, held_out_set, gamma=4, pad_id=3)
    assert (same.promote, same.gain) == (False, 0)


def test_a_candidate_of_no_numbers_is_refused(pair: TinyPair) -> None:
    """Training that diverged is reported in words, and as JSON without NaN."""
    good, broken = load(pair.draft), load(pair.draft)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    report = compare_drafts(good, broken, taught(pair.target, 12), gamma=4, pad_id=3)
    assert not report.promote
    assert "no numbers" in report.reason
    assert report.as_dict()["gain"] is None


def test_too_few_requests_are_refused(pair: TinyPair) -> None:
    """However good they look."""
    report = compare_drafts(
        load(pair.spoilt), load(pair.draft), taught(pair.target, 3), gamma=4, pad_id=3
    )
    assert not report.promote
    assert "only 3" in report.reason
