"""Speculation control: what it knows of costs and acceptance, what it chooses, and what the loop of them loses.

The closed loop runs in simulated seconds: a step costs what a table says, a token is accepted when a coin says so.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.policy.acceptance import PRIOR_RATE, ROUTE_MEMORY, SEQUENCE_MEMORY, Acceptance
from decoder.policy.gamma import MIN_SPEEDUP, PROBE_SHARE, GammaController, expected_tokens
from decoder.policy.step_times import StepTimes

MAX_GAMMA, SLOTS = 6, 8


def straight(plain: float, drafted: float) -> dict[int, float]:
    """Seconds by γ where every drafted token costs the same."""
    return {gamma: plain + gamma * drafted for gamma in range(MAX_GAMMA + 1)}


def control(plain: float, drafted: float, slots: int = SLOTS) -> GammaController:
    """One that has measured such steps, for every number of rows."""
    costs = StepTimes(MAX_GAMMA, slots)
    for rows in costs.batch_sizes:
        costs.calibrate(rows, straight(plain, drafted))
    return GammaController(costs, MAX_GAMMA)


# ── costs ──


def test_seconds_between_measured_ones_are_interpolated() -> None:
    """Three measurements make a whole row; beyond the last one nothing is made up."""
    costs = StepTimes(MAX_GAMMA, SLOTS)
    costs.calibrate(4, {0: 1.0, 1: 2.0, 5: 4.0})
    assert costs.seconds(4) == pytest.approx([1, 2, 2.5, 3, 3.5, 4, 4])


@given(st.integers(1, 40), st.data())
def test_numbers_of_rows_have_the_costs_of_the_next_measured_one(
    slots: int, data: st.DataObject
) -> None:
    """Every number up to that of slots, whether or not it is a power of two."""
    costs = StepTimes(2, slots)
    assert costs.batch_sizes[-1] == slots
    for rows in costs.batch_sizes:
        costs.calibrate(rows, {0: float(rows), 2: float(rows)})
    rows = data.draw(st.integers(1, slots))
    assert costs.seconds(rows)[0] == pytest.approx(
        min(known for known in costs.batch_sizes if known >= rows)
    )


def test_observed_steps_move_the_estimate_to_what_they_took() -> None:
    """Of this γ all the way; of other numbers of rows not at all."""
    costs = control(1.0, 0.5).step_times
    for _ in range(200):
        costs.observe(4, 2, 5.0)
    assert costs.seconds(4)[2] == pytest.approx(5.0, rel=0.01)
    assert costs.seconds(8) == pytest.approx(list(straight(1.0, 0.5).values()))


def test_a_gamma_that_is_not_tried_follows_its_neighbours() -> None:
    """When the others become four times slower it does so too, though not all the way: nobody has seen it."""
    costs = control(1.0, 0.5).step_times
    before = np.array(costs.seconds(4))
    for _ in range(200):
        for gamma in (0, 1, 2, 3):
            costs.observe(4, gamma, 4 * before[gamma])
    change = np.array(costs.seconds(4)) / before
    assert change[:4] == pytest.approx(4, rel=0.01)
    assert (change[4:] > 2).all()
    assert (change[4:] < 4).all()


def test_one_slow_step_says_little() -> None:
    """A thousandfold pause of the machine moves the estimate by a few percent."""
    costs = control(1.0, 0.5).step_times
    before = np.array(costs.seconds(4))
    costs.observe(4, 2, 1000 * before[2])
    assert (np.array(costs.seconds(4)) < 1.05 * before).all()


def test_a_measurement_replaces_what_steps_before_it_showed() -> None:
    """Steps are observed while they are being timed; what counts afterwards is the timing."""
    costs = StepTimes(MAX_GAMMA, SLOTS)
    for gamma in (0, 1, MAX_GAMMA):
        for _ in range(8):
            costs.observe(4, gamma, 0.01)
    costs.calibrate(4, straight(0.01, 0.005))
    assert costs.seconds(4) == pytest.approx(list(straight(0.01, 0.005).values()))


# ── tokens ──


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(0, 8))
def test_expected_tokens_are_the_sum_over_all_outcomes(rates: list[float], max_gamma: int) -> None:
    """Each row emits what is accepted before the first rejection, and one token of the target's."""
    found = expected_tokens(rates, max_gamma)
    for gamma in range(max_gamma + 1):
        total = 0.0
        for rate in rates:
            rejected_at = [rate**kept * (1 - rate) * (kept + 1) for kept in range(gamma)]
            total += sum(rejected_at) + rate**gamma * (gamma + 1)
        assert found[gamma] == pytest.approx(total)


# ── the choice ──


def test_a_draft_that_is_never_accepted_is_not_used() -> None:
    """However cheap it is."""
    assert control(1.0, 0.001).choose_gamma([0.0], 1) == 0
    assert control(1.0, 0.05).choose_gamma([0.02] * 4, 4) == 0


def test_good_and_cheap_drafts_are_used_as_far_as_they_go() -> None:
    """γ grows with acceptance and shrinks with the price of a drafted token."""
    by_rate = [control(1.0, 0.1).choose_gamma([rate], 1) for rate in (0.05, 0.3, 0.6, 0.8, 0.99)]
    assert by_rate == sorted(by_rate)
    assert (by_rate[0], by_rate[-1]) == (0, MAX_GAMMA)
    by_price = [control(1.0, price).choose_gamma([0.8], 1) for price in (0.01, 0.1, 0.3, 1.0)]
    assert by_price == sorted(by_price, reverse=True)
    assert (by_price[0], by_price[-1]) == (MAX_GAMMA, 0)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_drafting_that_costs_what_it_gains_is_left_out(rate: float) -> None:
    """Equal speeds for all γ; and a gain within the margin, which drafts' prompts would eat."""
    tokens = np.array(expected_tokens([rate], MAX_GAMMA))
    for gain, drafts in ((1.0, False), (0.99 * MIN_SPEEDUP, False), (1.05 * MIN_SPEEDUP, True)):
        costs = StepTimes(MAX_GAMMA, SLOTS)
        costs.calibrate(
            1, {gamma: tokens[gamma] / (gain if gamma else 1.0) for gamma in range(MAX_GAMMA + 1)}
        )
        assert (GammaController(costs, MAX_GAMMA).choose_gamma([rate], 1) > 0) == drafts


def test_rows_with_a_gamma_of_their_own_make_others_wait_for_less() -> None:
    """Longer steps cost them: what pays for one row alone does not pay in their company."""
    made = control(1.0, 0.3)
    assert made.choose_gamma([0.7], 1) > 0
    assert made.choose_gamma([0.7], 8) == 0
    assert made.choose_gamma([], 8) == 0


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 10), min_size=MAX_GAMMA + 1, max_size=MAX_GAMMA + 1),
)
def test_the_choice_is_the_fastest_by_what_is_known(
    rates: list[float], seconds: list[float]
) -> None:
    """No γ promises more tokens a second than the chosen one, but for the margin of the plain step."""
    costs = StepTimes(MAX_GAMMA, SLOTS)
    costs.calibrate(4, dict(enumerate(seconds)))
    speed = np.array(expected_tokens(rates, MAX_GAMMA)) / costs.seconds(4)
    chosen = (
        GammaController(costs, MAX_GAMMA).choose_gamma(rates, len(rates))
        if len(rates) > 2
        else None
    )
    if chosen:
        assert speed[chosen] == pytest.approx(speed.max())
        assert speed[chosen] > MIN_SPEEDUP * speed[0]
    elif chosen == 0:
        assert speed.max() <= MIN_SPEEDUP * speed[0] * (1 + 1e-9)


def test_a_request_may_ask_for_more_than_is_accounted_for() -> None:
    """Its steps say nothing about the γ that there are."""
    made = control(1.0, 0.5)
    before = made.step_times.seconds(1)
    made.observe_step(1, MAX_GAMMA + 1, 30.0, 1)
    assert made.step_times.seconds(1) == before


def test_probes_take_a_share_of_plain_steps() -> None:
    """Plain steps save up for them, drafted ones do not; never more than a step's worth is saved."""
    made = control(1.0, 0.5)
    made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(PROBE_SHARE)
    made.observe_step(1, 2, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(PROBE_SHARE)
    made.charge_probe(1.0)
    for _ in range(round(1 / PROBE_SHARE) - 2):
        made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s < 0
    for _ in range(round(2 / PROBE_SHARE)):
        made.observe_step(1, 0, 1.0, 1)
    assert made.probe_budget_s == pytest.approx(1.0)


# ── acceptance ──


def test_an_unknown_draft_is_given_a_try() -> None:
    """A route begins with the first guess, a row with what its route is like."""
    route = Acceptance(ROUTE_MEMORY)
    assert route.rate == pytest.approx(PRIOR_RATE)
    route.add(200.0, 1000)
    assert route.rate == pytest.approx(0.2, abs=0.01)
    assert Acceptance(SEQUENCE_MEMORY, route).rate == pytest.approx(route.rate)


def test_what_a_row_shows_outweighs_its_route_and_teaches_it() -> None:
    """A few dozen positions of its own decide; the route moves a little, so that its next rows know."""
    route = Acceptance(ROUTE_MEMORY)
    route.add(200.0, 1000)
    before = route.rate
    row = Acceptance(SEQUENCE_MEMORY, route)
    for _ in range(20):
        row.add(4.5, 5)
    assert row.rate > 0.75
    assert before < route.rate < row.rate


def test_old_positions_are_forgotten() -> None:
    """As many as the memory holds count; those before them fade."""
    acceptance = Acceptance(SEQUENCE_MEMORY)
    for _ in range(1000):
        acceptance.add(0.9, 1)
    high = acceptance.rate
    for _ in range(int(SEQUENCE_MEMORY)):
        acceptance.add(0.1, 1)
    between = acceptance.rate
    for _ in range(1000):
        acceptance.add(0.1, 1)
    # The prior keeps its weight against a memory of 32 positions.
    assert high == pytest.approx(0.87, abs=0.02)
    assert 0.3 < between < 0.6
    assert acceptance.rate == pytest.approx(0.19, abs=0.02)


def test_a_step_without_compared_positions_teaches_nothing() -> None:
    """Plain steps leave what is known as it was."""
    acceptance = Acceptance(SEQUENCE_MEMORY)
    acceptance.add(2.0, 4)
    before = acceptance.rate
    acceptance.add(0.0, 0)
    assert acceptance.rate == before


def test_a_new_draft_is_judged_afresh() -> None:
    """Nothing of the old one's acceptance is left."""
    acceptance = Acceptance(ROUTE_MEMORY)
    acceptance.add(0.0, 1000)
    acceptance.reset()
    assert acceptance.rate == pytest.approx(PRIOR_RATE)


# ── the loop ──


@dataclass
class Row:
    """One answer: what is known of its draft, and how many tokens the draft has not seen."""

    acceptance: Acceptance
    left: int
    unseen: int = 0


@dataclass
class Loop:
    """A batch that is always full, with the control that serves, in simulated seconds."""

    alpha: float  # how likely a drafted token is accepted
    seconds: np.ndarray  # of a step, by γ
    rows: int = 4
    noise: float = 0.1
    answer: int = 150  # tokens
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    clock_s: float = 0.0
    tokens: int = 0
    steps_by_gamma: np.ndarray = field(default_factory=lambda: np.zeros(MAX_GAMMA + 1, int))

    def __post_init__(self) -> None:
        costs = StepTimes(MAX_GAMMA, self.rows)
        for rows in costs.batch_sizes:
            costs.calibrate(
                rows, {gamma: float(self.seconds[gamma]) for gamma in (0, 1, MAX_GAMMA)}
            )
        self.control = GammaController(costs, MAX_GAMMA)
        self.route = Acceptance(ROUTE_MEMORY)
        self.running = [self._new() for _ in range(self.rows)]

    def run(self, steps: int) -> float:
        """Tokens per second over this many steps."""
        tokens, clock_s = self.tokens, self.clock_s
        for _ in range(steps):
            self._step()
        return (self.tokens - tokens) / (self.clock_s - clock_s)

    def _new(self) -> Row:
        return Row(
            Acceptance(SEQUENCE_MEMORY, self.route), int(self.rng.integers(1, 2 * self.answer))
        )

    def _step(self) -> None:
        gamma = self.control.choose_gamma([row.acceptance.rate for row in self.running], self.rows)
        if gamma == 0 and self.control.probe_budget_s > 0:
            self._probe()
        for row in self.running:
            accepted = self._accepted(gamma)
            row.acceptance.add(accepted, min(accepted + 1, gamma))
            row.unseen = row.unseen + 1 if gamma == 0 else 0
            row.left -= accepted + 1
            self.tokens += accepted + 1
        self.running = [row if row.left > 0 else self._new() for row in self.running]
        took = float(self.seconds[gamma] * np.exp(self.noise * self.rng.standard_normal()))
        self.clock_s += took
        self.steps_by_gamma[gamma] += 1
        self.control.observe_step(self.rows, gamma, took, self.rows)

    def _probe(self) -> None:
        """As the batch does: what plain steps emitted in one row goes through the draft at once."""
        row = max(self.running, key=lambda row: row.unseen)
        if row.unseen < 8:
            return
        hits = int((self.rng.random(row.unseen) < self.alpha).sum())
        row.acceptance.add(hits, row.unseen)
        row.unseen = 0
        took = float(self.seconds[1] - self.seconds[0]) * 2
        self.clock_s += took
        self.control.charge_probe(took)

    def _accepted(self, gamma: int) -> int:
        hits = self.rng.random(gamma) < self.alpha
        return len(list(itertools.takewhile(bool, hits)))

    @property
    def best_fixed(self) -> float:
        """Tokens per second of the best γ, if it were known."""
        return float(
            (self.rows * np.array(expected_tokens([self.alpha], MAX_GAMMA)) / self.seconds).max()
        )


def curve(draft_share: float, verify_share: float = 0.03, bend: float = 0.0) -> np.ndarray:
    """Seconds by γ: a plain step takes 10 ms; a drafted token costs a share of it, and so does verifying one."""
    gamma = np.arange(MAX_GAMMA + 1)
    return 0.01 * (1 + (draft_share + verify_share) * gamma + bend * gamma**2)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("draft_share", [0.05, 0.2, 0.5])
def test_a_random_draft_costs_almost_nothing(rows: int, draft_share: float) -> None:
    """2 % acceptance, from the first step on: less than 3 % of plain decoding is lost to trying and probing."""
    loop = Loop(0.02, curve(draft_share), rows)
    plain = rows / loop.seconds[0]
    noise = np.exp(
        loop.noise**2 / 2
    )  # the mean of a noisy step, which plain steps would take as well
    assert loop.run(4000) * noise > 0.97 * plain
    assert loop.steps_by_gamma[0] > 0.95 * loop.steps_by_gamma.sum()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("alpha", [0.6, 0.8, 0.95])
@pytest.mark.parametrize(("draft_share", "bend"), [(0.05, 0.0), (0.15, 0.0), (0.05, 0.02)])
def test_a_good_draft_gets_the_best_gamma(
    rows: int, alpha: float, draft_share: float, bend: float
) -> None:
    """Within 3 % of the best fixed γ, though acceptance has to be learnt and the curve is not the measured line."""
    loop = Loop(alpha, curve(draft_share, bend=bend), rows)
    loop.run(1000)
    noise = np.exp(loop.noise**2 / 2)
    assert loop.run(4000) * noise > 0.97 * loop.best_fixed


@pytest.mark.parametrize("factor", [1 / 3, 3])
@pytest.mark.parametrize("alpha", [0.02, 0.6, 0.9])
def test_a_machine_that_changes_its_pace_changes_no_choice(alpha: float, factor: float) -> None:
    """All steps take a third, or three times as long: what was best still is, also by the γ that are not tried."""
    loop = Loop(alpha, curve(0.15))
    loop.run(2000)
    loop.seconds = factor * loop.seconds
    noise = np.exp(loop.noise**2 / 2)
    assert loop.run(4000) * noise > 0.97 * loop.best_fixed


@pytest.mark.parametrize("factor", [1 / 3, 0.7, 3])
def test_a_machine_that_was_timed_at_another_pace_leaves_a_random_draft(factor: float) -> None:
    """Busy or idle while it was timed: only the trial steps correct it, and they must not look like a gain."""
    loop = Loop(0.02, curve(0.15))
    loop.seconds = factor * loop.seconds
    loop.run(1000)
    noise = np.exp(loop.noise**2 / 2)
    assert loop.run(3000) * noise > 0.97 * loop.best_fixed


def test_a_draft_that_becomes_dear_is_left_out() -> None:
    """A drafted token comes to cost as much as the target's own: plain steps, which cost what they did, win."""
    loop = Loop(0.8, curve(0.05))
    loop.run(1000)
    loop.seconds = curve(1.0)
    loop.run(500)
    noise = np.exp(loop.noise**2 / 2)
    assert loop.run(2000) * noise > 0.97 * loop.best_fixed


def test_probes_find_that_a_draft_has_become_good() -> None:
    """A bad draft is decoded without; when what it drafts would be accepted again, the loop drafts again."""
    loop = Loop(0.02, curve(0.05))
    loop.run(2000)
    assert loop.steps_by_gamma[0] > 1900
    loop.alpha = 0.9
    loop.run(4000)
    noise = np.exp(loop.noise**2 / 2)
    assert loop.run(2000) * noise > 0.97 * loop.best_fixed


def test_a_swap_is_tried_at_once() -> None:
    """With what was seen forgotten, a good draft after a bad one is found within an answer or so."""
    loop = Loop(0.02, curve(0.05))
    loop.run(2000)
    loop.alpha = 0.9
    loop.route.reset()
    before = loop.steps_by_gamma[0]
    loop.run(600)
    assert loop.steps_by_gamma[0] - before < 200
