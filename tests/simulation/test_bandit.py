"""The engine's own choice of a drafter: it finds what is fastest, stays there, and notices when that changes.

In simulated seconds: a step of each way emits tokens at random and takes a time at random.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from decoder.policy.bandit import MIN_TIME_SHARE, DrafterBandit
from decoder.policy.drafter_speed import ROUND_STEPS, Workload

HERE = Workload("default", 3, greedy=False)


def play(
    choice: DrafterBandit,
    means: Sequence[float],
    steps: int,
    rng: np.random.Generator,
    where: Workload = HERE,
) -> float:
    """Tokens per second, where way i emits `means[i]` tokens in about a second."""
    tokens = seconds = 0.0
    for _ in range(steps):
        mean = means[int(choice.choose(where))]
        emitted, taken = 1 + int(rng.binomial(8, (mean - 1) / 8)), float(rng.uniform(0.8, 1.2))
        choice.observe(emitted, taken)
        tokens, seconds = tokens + emitted, seconds + taken
    return tokens / seconds


def made(ways: int) -> DrafterBandit:
    return DrafterBandit([str(i) for i in range(ways)])


def fastest(choice: DrafterBandit) -> str:
    return max((belief.log_speed, name) for name, belief in choice.estimates(HERE).items())[1]


@pytest.mark.parametrize(
    "means", [(2.0, 2.1, 1.8, 2.6), (2.0, 2.04, 1.96, 2.02), (3.0, 1.4, 1.4, 1.2)]
)
def test_it_costs_hardly_more_than_knowing_what_is_best(means: tuple[float, ...]) -> None:
    """After the first tries: 0.97 of the best, be the ways far apart or close together."""
    rng, choice = np.random.default_rng(0), made(len(means))
    play(choice, means, 10 * ROUND_STEPS * len(means), rng)
    assert play(choice, means, 5000, rng) > 0.97 * max(means)


def share_of_best(speeds: Sequence[float], steps: int, seed: int) -> float:
    """Expected tokens per second of what was chosen, of the best's, where every 40 steps another text is more or less
    predictable, whatever drafts."""
    rng, choice, text, seconds = np.random.default_rng(seed), made(len(speeds)), 1.0, 0.0
    for step in range(steps):
        if step % 40 == 0:
            text = float(np.exp(rng.normal(0, 0.2)))
        speed = speeds[int(choice.choose(HERE._replace(log2_batch_size=0)))]
        choice.observe(
            round(100 * text * (1 + rng.poisson(1.0))), float(np.exp(rng.normal(0, 0.15))) / speed
        )
        seconds += 1 / speed
    return steps / seconds / max(speeds)


def test_one_easy_text_does_not_decide() -> None:
    """The first stretches say little: nearly all of a hundred services come to the best or to one that is as good."""
    shares = [share_of_best((0.8, 0.9, 1.0, 0.75), 3000, seed) for seed in range(100)]
    assert np.mean(shares) > 0.97
    assert np.percentile(shares, 10) > 0.95


@pytest.mark.parametrize("second", [2.0, 2.49])
def test_it_follows_a_change(second: float) -> None:
    """A way that becomes the best is found by the floor's share of tries, though it was the worst of three, and two of
    them so close that they took turns."""
    rng, choice = np.random.default_rng(1), made(3)
    play(choice, (2.5, second, 1.5), 3000, rng)
    play(choice, (2.5, second, 3.5), 6000, rng)
    assert fastest(choice) == "2"


def test_others_get_their_share_and_no_more() -> None:
    """Of the time."""
    rng, choice = np.random.default_rng(2), made(4)
    play(choice, (3.0, 1.5, 1.5, 1.5), 4 * ROUND_STEPS, rng)
    other = 0
    for _ in range(10_000):
        other += choice.choose(HERE) != "0"
        play(choice, (3.0, 1.5, 1.5, 1.5), 1, rng)
    assert 0.3 * MIN_TIME_SHARE < other / 10_000 < MIN_TIME_SHARE  # the first tries count, too


def test_a_try_does_not_pay_for_what_was_drafted_without_it() -> None:
    """Catching up counts for the way in use, and not for one that is tried."""
    choice = DrafterBandit(("old", "new"))
    for _ in range(4 * ROUND_STEPS):
        choice.choose(HERE)
        choice.observe(2, 1.0, catch_up_s=1.0)
    assert choice.estimates(HERE)["old"].log_speed < math.log(1.9)
    tried = DrafterBandit(("old", "new"))
    for _ in range(2 * ROUND_STEPS):
        tried.choose(HERE)
        tried.observe(2, 1.0, catch_up_s=1.0)
    assert tried.estimates(HERE)["new"].log_speed == pytest.approx(math.log(2))


def test_situations_are_told_apart() -> None:
    """What is best for one row need not be for eight."""
    choice = DrafterBandit(("slow", "fast"))
    for _ in range(40 * ROUND_STEPS):
        for rows, good in ((0, "fast"), (3, "slow")):
            choice.observe(
                3 if choice.choose(HERE._replace(log2_batch_size=rows)) == good else 1, 1.0
            )
    played = [
        [choice.choose(HERE._replace(log2_batch_size=rows)) for _ in range(2)][-1]
        for rows in (0, 3)
    ]
    assert played == ["fast", "slow"]


def test_a_new_situation_begins_with_what_others_say() -> None:
    """Nothing that is slow wherever it was tried is tried anew at once; another route's ways are its own."""
    rng, choice = np.random.default_rng(3), made(4)
    play(choice, (1.5, 3.0, 1.5, 1.5), 20 * ROUND_STEPS, rng)
    assert (
        play(choice, (1.5, 3.0, 1.5, 1.5), 8 * ROUND_STEPS, rng, HERE._replace(log2_batch_size=2))
        > 0.95 * 3.0
    )
    other = HERE._replace(route="other")
    tried = {
        choice.choose(other)
        for _ in range(4 * ROUND_STEPS)
        if play(choice, (2.0,) * 4, 1, rng, other)
    }
    assert tried == {"0", "1", "2", "3"}


def test_what_others_say_does_not_bind() -> None:
    """What is best for eight rows is given up for one row where its own steps say so."""
    shares = []
    for seed in range(10):
        rng, choice, alone = np.random.default_rng(seed), made(4), HERE._replace(log2_batch_size=0)
        play(choice, (2.4, 2.0, 2.0, 1.8), 60 * ROUND_STEPS, rng)
        play(choice, (2.0, 2.0, 2.6, 1.8), 20 * ROUND_STEPS, rng, alone)
        shares.append(play(choice, (2.0, 2.0, 2.6, 1.8), 40 * ROUND_STEPS, rng, alone) / 2.6)
    assert min(shares) > 0.9
    assert np.mean(shares) > 0.95


def test_short_situations_learn_together() -> None:
    """Six of them that take turns, alike but not the same: of the best way of each, from the second 250 steps on."""
    shares = []
    for seed in range(20):
        rng, choice = np.random.default_rng(seed), made(4)
        common, worth, best = rng.normal(0, 0.15, 4), 0.0, 0.0
        speeds = {
            Workload("default", rows, greedy): 2.0**rows * np.exp(common + rng.normal(0, 0.05, 4))
            for rows in (1, 2, 3)
            for greedy in (False, True)
        }
        for step in range(500):
            where = list(speeds)[step // 12 % len(speeds)]
            speed = speeds[where][int(choice.choose(where))]
            choice.observe(
                round(100 * (1 + rng.poisson(1.0))), float(np.exp(rng.normal(0, 0.15))) / speed
            )
            if step >= 250:
                worth, best = worth + 1 / speed, best + 1 / max(speeds[where])
        shares.append(best / worth)
    assert np.mean(shares) > 0.94
