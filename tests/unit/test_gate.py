"""The gate: only a better draft passes."""

import itertools

import numpy as np
import pytest

from tests.signals import signal
from trainer.evaluation import Evaluation, served_gamma, tokens_per_step
from trainer.examples import held_out
from trainer.gate import GateReport, PairedEvaluation, decide, mean_by_request
from trainer.intervals import bootstrap_interval


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


def test_few_or_broken_requests_prove_nothing() -> None:
    """No interval, no promotion."""
    assert bootstrap_interval(np.array([1.0]), 0) == (float("-inf"), float("inf"))
    assert bootstrap_interval(np.array([1.0, np.nan, 2.0]), 0) == (float("-inf"), float("inf"))


def test_answers_to_one_request_are_one_observation() -> None:
    """Eight requests of four answers each are eight, whatever order they came in."""
    signals = [signal(f"r{i % 8}#{i // 8}") for i in range(32)]
    evaluation = Evaluation(np.arange(32.0), np.arange(32.0) / 32)
    found = mean_by_request(evaluation, signals)
    assert found.tokens_R.tolist() == [i + 12.0 for i in range(8)]
    assert found.acceptance_R.tolist() == [(i + 12.0) / 32 for i in range(8)]
    assert len({held_out(one) for one in signals if one.origin == "r3"}) == 1
    assert mean_by_request(Evaluation(np.zeros(0), np.zeros(0)), []).tokens_R.tolist() == []


def compared(gain_R: np.ndarray, level: float = 2.0) -> PairedEvaluation:
    """An active draft of `level` tokens per step, and a candidate with these gains."""
    level_R, rate_R = np.full(len(gain_R), level), np.full(len(gain_R), 0.5)
    return PairedEvaluation(Evaluation(level_R, rate_R), Evaluation(level_R + gain_R, rate_R))


def verdict(new_R: np.ndarray, earlier_R: np.ndarray, **more: float) -> GateReport:
    return decide(compared(new_R), compared(earlier_R), gamma=4, **more)  # type: ignore[arg-type]


BETTER = np.linspace(0.1, 0.3, 40)


def test_a_candidate_that_forgets_is_refused_however_much_it_gains() -> None:
    """The report has both strata, as JSON without infinities."""
    report = verdict(BETTER, np.full(40, -0.07))
    assert (report.promote, report.gain_low > 0) == (False, True)
    assert (
        report.reason == "forgets: -0.070 tokens per step on 40 earlier held-out requests, "
        "where -0.060 is tolerated"
    )
    figures = report.as_dict()
    assert (
        figures["requests"],
        figures["active_tokens_per_step"],
        figures["forgetting_tolerance"],
    ) == (
        40,
        2.0,
        0.03,
    )
    assert figures["earlier"]["candidate_tokens_per_step"] == pytest.approx(1.93)  # type: ignore[index]


def test_the_tolerance_is_a_share_of_the_active_drafts_tokens() -> None:
    """The mean loss decides, not single requests; the tolerance is configurable."""
    assert verdict(BETTER, np.full(40, -0.05)).promote
    assert verdict(BETTER, np.tile([-1.0, 0.9], 20)).promote
    assert not verdict(BETTER, np.full(40, -0.05), tolerance=0.02).promote
    assert verdict(BETTER, np.full(40, -0.5), tolerance=1).promote


def test_few_earlier_requests_are_no_obstacle() -> None:
    """Fewer than eight prove no loss; without any, the report has None."""
    assert verdict(BETTER, np.full(7, -1.0)).promote
    assert not verdict(BETTER, np.full(8, -1.0)).promote
    report = verdict(BETTER, np.zeros(0))
    assert report.promote
    assert report.as_dict()["earlier"]["gain_low"] is None  # type: ignore[index]


def test_no_numbers_on_earlier_traffic_are_refused() -> None:
    """A comparison with NaN is no pass."""
    assert not verdict(BETTER, np.full(20, np.nan)).promote


def test_drafts_are_compared_at_the_gamma_that_was_served() -> None:
    """The median request's γ among drafting steps; the maximum if no step drafted."""

    def drafting(*drafted: int) -> object:
        return signal(step_drafted=np.array(drafted, np.int32))

    usual = [drafting(3, 0, 3), drafting(2, 3, 4), drafting(0, 0)]
    assert served_gamma([*usual, drafting(16)], 6) == 3  # type: ignore[list-item]
    assert served_gamma([drafting(16)], 6) == 6  # type: ignore[list-item]
    assert served_gamma([drafting(0)], 6) == served_gamma([], 6) == 6  # type: ignore[list-item]
