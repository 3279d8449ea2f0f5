"""Step times: calibration, interpolation, and corrections by observed steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.policy.step_times import StepTimes

MAX_GAMMA = 6
SLOTS = 8


def linear(plain: float, drafted: float) -> dict[int, float]:
    """Seconds by γ where every drafted token costs the same."""
    return {gamma: plain + gamma * drafted for gamma in range(MAX_GAMMA + 1)}


def calibrated(plain: float, drafted: float) -> StepTimes:
    """Calibrated with the same times for every batch size."""
    times = StepTimes(MAX_GAMMA, SLOTS)
    for batch_size in times.batch_sizes:
        times.calibrate(batch_size, linear(plain, drafted))
    return times


def test_seconds_between_measured_gammas_are_interpolated() -> None:
    """Beyond the last measurement its value holds: nothing is extrapolated."""
    times = StepTimes(MAX_GAMMA, SLOTS)
    times.calibrate(4, {0: 1.0, 1: 2.0, 5: 4.0})
    assert times.seconds(4) == pytest.approx([1, 2, 2.5, 3, 3.5, 4, 4])


@given(st.integers(1, 40), st.data())
def test_a_batch_size_has_the_times_of_the_next_measured_one(
    slots: int, data: st.DataObject
) -> None:
    """Every batch size up to the number of slots, powers of two or not."""
    times = StepTimes(2, slots)
    assert times.batch_sizes[-1] == slots
    for batch_size in times.batch_sizes:
        times.calibrate(batch_size, {0: float(batch_size), 2: float(batch_size)})
    batch_size = data.draw(st.integers(1, slots))
    expected = min(known for known in times.batch_sizes if known >= batch_size)
    assert times.seconds(batch_size)[0] == pytest.approx(expected)


def test_observed_steps_correct_the_prediction() -> None:
    """Fully for their γ, and not at all for other batch sizes."""
    times = calibrated(1.0, 0.5)
    for _ in range(200):
        times.observe(4, 2, 5.0)
    assert times.seconds(4)[2] == pytest.approx(5.0, rel=0.01)
    assert times.seconds(8) == pytest.approx(list(linear(1.0, 0.5).values()))


def test_a_gamma_without_steps_follows_its_neighbours() -> None:
    """When the others become four times slower, it becomes slower too, though by less."""
    times = calibrated(1.0, 0.5)
    before = np.array(times.seconds(4))
    for _ in range(200):
        for gamma in (0, 1, 2, 3):
            times.observe(4, gamma, 4 * before[gamma])
    change = np.array(times.seconds(4)) / before
    assert change[:4] == pytest.approx(4, rel=0.01)
    assert (change[4:] > 2).all()
    assert (change[4:] < 4).all()


def test_one_slow_step_changes_little() -> None:
    """A pause of a thousand steps moves the prediction by less than five percent."""
    times = calibrated(1.0, 0.5)
    before = np.array(times.seconds(4))
    times.observe(4, 2, 1000 * before[2])
    assert (np.array(times.seconds(4)) < 1.05 * before).all()


def test_calibration_drops_earlier_corrections() -> None:
    """Steps are observed during calibration, too; only its result counts afterwards."""
    times = StepTimes(MAX_GAMMA, SLOTS)
    for gamma in (0, 1, MAX_GAMMA):
        for _ in range(8):
            times.observe(4, gamma, 0.01)
    times.calibrate(4, linear(0.01, 0.005))
    assert times.seconds(4) == pytest.approx(list(linear(0.01, 0.005).values()))
