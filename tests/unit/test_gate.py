"""The gate: only a better draft passes."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.signals import taught
from tests.tiny import TinyPair
from trainer.gate import bootstrap_interval, judge, tokens_per_step


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_tokens_per_step_is_the_expectation_over_accept_and_reject(gamma: int) -> None:
    """Against an enumeration of every accept/reject outcome from every start."""
    rates = np.array([0.9, 0.3, 0.6, 1.0, 0.0, 0.5])
    total = 0.0
    for start in range(len(rates)):
        ahead = rates[start : start + gamma]
        for outcome in itertools.product([0, 1], repeat=len(ahead)):
            mass = np.prod([a if o else 1 - a for a, o in zip(ahead, outcome, strict=True)])
            emitted = 1 + next((i for i, o in enumerate(outcome) if not o), len(outcome))
            total += mass * emitted
    assert tokens_per_step(rates, gamma) == pytest.approx(total / len(rates))


def test_equal_candidates_pass_in_at_most_one_of_twenty() -> None:
    """200 null comparisons of 100 requests: at most 5 % lower bounds above zero, with room for chance."""
    rng = np.random.default_rng(0)
    passed = sum(bootstrap_interval(rng.normal(0, 0.3, 100), seed)[0] > 0 for seed in range(200))
    assert passed <= 10


def test_few_or_broken_requests_prove_nothing() -> None:
    """No interval, no promotion."""
    assert bootstrap_interval(np.array([1.0]), 0) == (float("-inf"), float("inf"))
    assert bootstrap_interval(np.array([1.0, np.nan, 2.0]), 0) == (float("-inf"), float("inf"))


def load(folder: object) -> torch.nn.Module:
    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module


def test_a_better_draft_is_promoted_and_a_worse_one_refused(pair: TinyPair) -> None:
    """The good draft against the spoilt one, both ways round, and against itself."""
    good, spoilt = load(pair.draft), load(pair.spoilt)
    exam = taught(pair.target, 30)
    better = judge(spoilt, good, exam, gamma=4, pad_id=3)
    assert better.promote
    assert better.gain_low > 0
    assert better.candidate_acceptance > better.active_acceptance
    worse = judge(good, spoilt, exam, gamma=4, pad_id=3)
    assert not worse.promote
    assert worse.reason.startswith("worse")
    same = judge(good, good, exam, gamma=4, pad_id=3)
    assert (same.promote, same.gain) == (False, 0)


def test_a_candidate_of_no_numbers_is_refused(pair: TinyPair) -> None:
    """Training that diverged is reported in words, and as JSON without NaN."""
    good, broken = load(pair.draft), load(pair.draft)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    report = judge(good, broken, taught(pair.target, 12), gamma=4, pad_id=3)
    assert not report.promote
    assert "no numbers" in report.reason
    assert report.as_dict()["gain"] is None


def test_too_few_requests_are_refused(pair: TinyPair) -> None:
    """However good they look."""
    report = judge(load(pair.spoilt), load(pair.draft), taught(pair.target, 3), gamma=4, pad_id=3)
    assert not report.promote
    assert "only 3" in report.reason
