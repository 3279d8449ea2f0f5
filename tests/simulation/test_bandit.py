"""The bandit of drafters: it finds the fastest, stays with it, and notices changes.

Time is simulated: a step of each drafter emits random tokens in a random time.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from decoder.policy.bandit import MIN_TIME_SHARE, DrafterBandit
from decoder.policy.drafter_speed import ROUND_STEPS, Workload

EIGHT = Workload.of("default", 8, greedy=False)
ONE = Workload.of("default", 1, greedy=False)


def bandit(drafters: int) -> DrafterBandit:
    """With drafters "0", "1" and so on."""
    return DrafterBandit([str(i) for i in range(drafters)])


def play(
    bandit: DrafterBandit,
    means: Sequence[float],
    steps: int,
    rng: np.random.Generator,
    workload: Workload = EIGHT,
) -> float:
    """Tokens per second, where drafter i emits `means[i]` tokens in about a second."""
    accepted = [rng.binomial(8, (mean - 1) / 8, steps).tolist() for mean in means]
    seconds = rng.uniform(0.8, 1.2, steps).tolist()
    total = 0
    for step in range(steps):
        tokens = 1 + accepted[int(bandit.choose(workload))][step]
        bandit.observe(tokens, seconds[step])
        total += tokens
    return total / sum(seconds)


def fastest(bandit: DrafterBandit) -> str:
    estimates = bandit.estimates(EIGHT)
    return max(estimates, key=lambda name: estimates[name].log_speed)


@pytest.mark.parametrize(
    "means", [(2.0, 2.1, 1.8, 2.6), (2.0, 2.04, 1.96, 2.02), (3.0, 1.4, 1.4, 1.2)]
)
def test_the_choice_reaches_almost_the_speed_of_the_best(means: tuple[float, ...]) -> None:
    """After the first trials 0.97 of it, whether drafters differ much or little."""
    rng = np.random.default_rng(0)
    made = bandit(len(means))
    play(made, means, 10 * ROUND_STEPS * len(means), rng)
    assert play(made, means, 5000, rng) > 0.97 * max(means)


def share_of_best(speeds: Sequence[float], steps: int, seed: int) -> float:
    """Expected tokens per second, divided by those of the best drafter.

    Every 40 steps another text is easier or harder for all drafters.
    """
    rng = np.random.default_rng(seed)
    made = bandit(len(speeds))
    ease, seconds = 1.0, 0.0
    for step in range(steps):
        if step % 40 == 0:
            ease = math.exp(rng.normal(0, 0.2))
        speed = speeds[int(made.choose(ONE))]
        tokens = round(100 * ease * (1 + rng.poisson(1.0)))
        made.observe(tokens, math.exp(rng.normal(0, 0.15)) / speed)
        seconds += 1 / speed
    return steps / seconds / max(speeds)


def test_one_easy_text_does_not_decide() -> None:
    """The first rounds say little: of a hundred services nearly all reach the best speed."""
    shares = [share_of_best((0.8, 0.9, 1.0, 0.75), 3000, seed) for seed in range(100)]
    assert np.mean(shares) > 0.97
    assert np.percentile(shares, 10) > 0.95


@pytest.mark.parametrize("second", [2.0, 2.49])
def test_it_follows_a_change(second: float) -> None:
    """The minimum share finds that the slowest of three drafters has become the fastest."""
    rng = np.random.default_rng(1)
    made = bandit(3)
    play(made, (2.5, second, 1.5), 3000, rng)
    play(made, (2.5, second, 3.5), 6000, rng)
    assert fastest(made) == "2"


def test_slow_drafters_get_their_minimum_share_and_no_more() -> None:
    """Of the steps; the first trials count towards it."""
    rng = np.random.default_rng(2)
    made = bandit(4)
    accepted = rng.binomial(8, np.array([2.0, 0.5])[:, None] / 8, (2, 10_000)).tolist()
    seconds = rng.uniform(0.8, 1.2, 10_000).tolist()
    play(made, (3.0, 1.5, 1.5, 1.5), 4 * ROUND_STEPS, rng)
    others = 0
    for step in range(10_000):
        slow = made.choose(EIGHT) != "0"
        made.observe(1 + accepted[slow][step], seconds[step])
        others += slow
    assert 0.3 * MIN_TIME_SHARE < others / 10_000 < MIN_TIME_SHARE


def test_a_trial_does_not_pay_for_catching_up() -> None:
    """The drafter in use does, because its own steps leave other drafts behind."""
    used = DrafterBandit(("old", "new"))
    for _ in range(4 * ROUND_STEPS):
        used.choose(EIGHT)
        used.observe(2, 1.0, catch_up_s=1.0)
    assert used.estimates(EIGHT)["old"].log_speed < math.log(1.9)
    tried = DrafterBandit(("old", "new"))
    for _ in range(2 * ROUND_STEPS):
        tried.choose(EIGHT)
        tried.observe(2, 1.0, catch_up_s=1.0)
    assert tried.estimates(EIGHT)["new"].log_speed == pytest.approx(math.log(2))


def test_workloads_are_told_apart() -> None:
    """The best drafter of one sequence need not be that of eight."""
    made = DrafterBandit(("slow", "fast"))
    for _ in range(40 * ROUND_STEPS):
        for workload, best in ((ONE, "fast"), (EIGHT, "slow")):
            made.observe(3 if made.choose(workload) == best else 1, 1.0)
    chosen = [[made.choose(workload) for _ in range(2)][-1] for workload in (ONE, EIGHT)]
    assert chosen == ["fast", "slow"]


def test_a_new_workload_starts_from_similar_ones() -> None:
    """A drafter that is slow in all of them is not tried at once. Routes learn apart."""
    rng = np.random.default_rng(3)
    made = bandit(4)
    means = (1.5, 3.0, 1.5, 1.5)
    play(made, means, 20 * ROUND_STEPS, rng)
    four = Workload.of("default", 4, greedy=False)
    assert play(made, means, 8 * ROUND_STEPS, rng, four) > 0.95 * 3.0
    other = Workload.of("other", 8, greedy=False)
    tried = set()
    for _ in range(4 * ROUND_STEPS):
        tried.add(made.choose(other))
        made.observe(2, 1.0)
    assert tried == {"0", "1", "2", "3"}


def test_own_measurements_overrule_borrowed_ones() -> None:
    """The best drafter of eight sequences is given up for one sequence that it slows down."""
    shares = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        made = bandit(4)
        alone = (2.0, 2.0, 2.6, 1.8)
        play(made, (2.4, 2.0, 2.0, 1.8), 60 * ROUND_STEPS, rng)
        play(made, alone, 20 * ROUND_STEPS, rng, ONE)
        shares.append(play(made, alone, 40 * ROUND_STEPS, rng, ONE) / 2.6)
    assert min(shares) > 0.9
    assert np.mean(shares) > 0.95


def share_of_best_in_turns(seed: int) -> float:
    """Six similar workloads take turns; the share is that of steps 250 to 500."""
    rng = np.random.default_rng(seed)
    made = bandit(4)
    common = rng.normal(0, 0.15, 4)
    speeds = {
        Workload("default", size, greedy): 2.0**size * np.exp(common + rng.normal(0, 0.05, 4))
        for size in (1, 2, 3)
        for greedy in (False, True)
    }
    tokens = (100 * (1 + rng.poisson(1.0, 500))).tolist()
    noise = np.exp(rng.normal(0, 0.15, 500)).tolist()
    seconds = best_seconds = 0.0
    for step in range(500):
        workload = list(speeds)[step // 12 % len(speeds)]
        speed = float(speeds[workload][int(made.choose(workload))])
        made.observe(tokens[step], noise[step] / speed)
        if step >= 250:
            seconds += 1 / speed
            best_seconds += 1 / float(speeds[workload].max())
    return best_seconds / seconds


def test_short_workloads_learn_together() -> None:
    """Each of them alone would have too few steps."""
    assert np.mean([share_of_best_in_turns(seed) for seed in range(20)]) > 0.94
