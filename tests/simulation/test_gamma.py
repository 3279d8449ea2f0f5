"""The choice of γ in a closed loop: how much speed is lost to learning, trying and probing.

Time is simulated. A table gives the seconds of a step, and a drafted token is accepted with
probability α. Speed is measured by expected tokens and expected seconds of the chosen γ, so
that only the choices differ between runs, not their luck.
"""

import math
from dataclasses import dataclass, field
from random import Random

import pytest

from decoder.policy.acceptance import ROUTE_MEMORY, SEQUENCE_MEMORY, Acceptance
from decoder.policy.gamma import GammaController, expected_tokens
from decoder.policy.step_times import StepTimes

MAX_GAMMA = 6
NOISE = 0.1  # standard deviation of a step's log seconds
ANSWER = 150  # tokens of an answer, on average
PROBED = 8  # plain tokens of a sequence before a probe, as in the engine
ENOUGH = 0.97  # of the speed that a perfect choice would have


@dataclass
class SimulatedSequence:
    acceptance: Acceptance
    remaining: int  # tokens
    unseen: int = 0  # plain tokens that the draft has not encoded


def curve(draft_share: float, verify_share: float = 0.03, bend: float = 0.0) -> list[float]:
    """Seconds by γ; drafting and verifying a token cost these shares of a plain step."""
    share = draft_share + verify_share
    return [0.01 * (1 + share * gamma + bend * gamma**2) for gamma in range(MAX_GAMMA + 1)]


@dataclass
class Loop:
    """A batch that is always full, with the controller that serves."""

    alpha: float
    seconds: list[float]  # by γ
    batch_size: int = 4
    rng: Random = field(default_factory=lambda: Random(0))
    plain_steps: int = 0

    def __post_init__(self) -> None:
        times = StepTimes(MAX_GAMMA, self.batch_size)
        measured = {gamma: self.seconds[gamma] for gamma in (0, 1, MAX_GAMMA)}
        for batch_size in times.batch_sizes:
            times.calibrate(batch_size, measured)
        self.controller = GammaController(times, MAX_GAMMA)
        self.route = Acceptance(ROUTE_MEMORY)
        self.seqs = [self._new() for _ in range(self.batch_size)]

    @property
    def best_speed(self) -> float:
        """Tokens per second of the best fixed γ."""
        return max(n / s for n, s in zip(self._tokens(), self.seconds, strict=True))

    def run(self, steps: int) -> float:
        """Expected tokens per second over this many steps, probes included."""
        expected = self._tokens()
        tokens = seconds = 0.0
        for _ in range(steps):
            gamma, probe_s = self._step()
            tokens += expected[gamma]
            seconds += self.seconds[gamma] + probe_s
        return tokens / seconds

    def _tokens(self) -> list[float]:
        return expected_tokens([self.alpha] * self.batch_size, MAX_GAMMA)

    def _new(self) -> SimulatedSequence:
        acceptance = Acceptance(SEQUENCE_MEMORY, self.route)
        return SimulatedSequence(acceptance, self.rng.randrange(1, 2 * ANSWER))

    def _step(self) -> tuple[int, float]:
        rates = [seq.acceptance.rate for seq in self.seqs]
        gamma = self.controller.choose_gamma(rates, self.batch_size)
        self.plain_steps += gamma == 0
        probe_s = 0.0
        if gamma == 0 and self.controller.probe_budget_s > 0:
            probe_s = self._probe()
        for i, seq in enumerate(self.seqs):
            accepted = self._accepted(gamma)
            seq.acceptance.add(accepted, min(accepted + 1, gamma))
            seq.unseen = 0 if gamma else seq.unseen + 1
            seq.remaining -= accepted + 1
            if seq.remaining <= 0:
                self.seqs[i] = self._new()
        seconds = self.seconds[gamma] * math.exp(NOISE * self.rng.gauss(0, 1))
        self.controller.observe_step(self.batch_size, gamma, seconds, self.batch_size)
        return gamma, probe_s

    def _accepted(self, gamma: int) -> int:
        accepted = 0
        while accepted < gamma and self.rng.random() < self.alpha:
            accepted += 1
        return accepted

    def _probe(self) -> float:
        """Runs the draft over the plain tokens of one sequence, as the engine does."""
        seq = max(self.seqs, key=lambda seq: seq.unseen)
        if seq.unseen < PROBED:
            return 0.0
        hits = sum(self.rng.random() < self.alpha for _ in range(seq.unseen))
        seq.acceptance.add(hits, seq.unseen)
        seq.unseen = 0
        seconds = 2 * (self.seconds[1] - self.seconds[0])
        self.controller.charge_probe(seconds)
        return seconds


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("draft_share", [0.05, 0.2, 0.5])
def test_a_random_draft_costs_almost_nothing(batch_size: int, draft_share: float) -> None:
    """α = 0.02: trying and probing lose less than 3 % of plain decoding, from the first step on."""
    loop = Loop(0.02, curve(draft_share), batch_size)
    assert loop.run(2000) > ENOUGH * batch_size / loop.seconds[0]
    assert loop.plain_steps > 0.95 * 2000


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.95])
@pytest.mark.parametrize(("draft_share", "bend"), [(0.05, 0.0), (0.15, 0.0), (0.05, 0.02)])
def test_a_good_draft_gets_the_best_gamma(
    batch_size: int, alpha: float, draft_share: float, bend: float
) -> None:
    """Although acceptance must be learned, and the curve is not the interpolated line."""
    loop = Loop(alpha, curve(draft_share, bend=bend), batch_size)
    loop.run(500)
    assert loop.run(1000) > ENOUGH * loop.best_speed


@pytest.mark.parametrize("factor", [1 / 3, 3])
@pytest.mark.parametrize("alpha", [0.02, 0.6, 0.9])
def test_a_change_of_the_machines_speed_changes_no_choice(alpha: float, factor: float) -> None:
    """All steps become three times faster or slower, so the best γ stays the same."""
    loop = Loop(alpha, curve(0.15))
    loop.run(500)
    loop.seconds = [factor * seconds for seconds in loop.seconds]
    assert loop.run(1500) > ENOUGH * loop.best_speed


@pytest.mark.parametrize("factor", [1 / 3, 0.7, 3])
def test_a_calibration_at_another_speed_does_not_make_a_random_draft_look_good(
    factor: float,
) -> None:
    """Only the trial steps correct the calibration, and they must not look like a gain."""
    loop = Loop(0.02, curve(0.15))
    loop.seconds = [factor * seconds for seconds in loop.seconds]
    loop.run(500)
    assert loop.run(1500) > ENOUGH * loop.best_speed


def test_a_draft_that_becomes_expensive_is_no_longer_used() -> None:
    """A drafted token comes to cost as much as a plain step, so plain steps win."""
    loop = Loop(0.8, curve(0.05))
    loop.run(500)
    loop.seconds = curve(1.0)
    loop.run(500)
    assert loop.run(1000) > ENOUGH * loop.best_speed


def test_probes_find_that_a_draft_has_become_good() -> None:
    """Probes notice, without any drafted step, that acceptance has risen."""
    loop = Loop(0.02, curve(0.05))
    loop.run(1000)
    assert loop.plain_steps > 900
    loop.alpha = 0.9
    loop.run(4000)
    assert loop.run(500) > ENOUGH * loop.best_speed


def test_a_new_draft_is_tried_at_once() -> None:
    """After a reset, a good draft that follows a bad one is in use within an answer or so."""
    loop = Loop(0.02, curve(0.05))
    loop.run(1000)
    loop.alpha = 0.9
    loop.route.reset()
    before = loop.plain_steps
    loop.run(600)
    assert loop.plain_steps - before < 200
