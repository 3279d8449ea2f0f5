"""Acceptance rates: priors, memory, and what sequences and routes learn from each other."""

import pytest

from decoder.policy.acceptance import (
    MAX_RANK,
    PRIOR_RATE,
    RANK_DECAY,
    ROUTE_MEMORY,
    SEQUENCE_MEMORY,
    Acceptance,
    RankAcceptance,
)


def test_a_sequence_starts_from_its_route_and_a_route_from_the_prior() -> None:
    """An unknown draft is tried; a new sequence expects what its route has shown."""
    route = Acceptance(ROUTE_MEMORY)
    assert route.rate == pytest.approx(PRIOR_RATE)
    route.add(200.0, 1000)
    assert route.rate == pytest.approx(0.2, abs=0.01)
    assert Acceptance(SEQUENCE_MEMORY, route).rate == pytest.approx(route.rate)


def test_a_sequence_outweighs_its_route_and_teaches_it() -> None:
    """A hundred positions of its own decide; the route moves a little."""
    route = Acceptance(ROUTE_MEMORY)
    route.add(200.0, 1000)
    before = route.rate
    sequence = Acceptance(SEQUENCE_MEMORY, route)
    for _ in range(20):
        sequence.add(4.5, 5)
    assert sequence.rate > 0.75
    assert before < route.rate < sequence.rate


def test_old_positions_fade() -> None:
    """Positions within the memory dominate; older ones lose their weight."""
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


def test_a_step_without_compared_positions_changes_nothing() -> None:
    """Plain steps leave the rate as it was."""
    acceptance = Acceptance(SEQUENCE_MEMORY)
    acceptance.add(2.0, 4)
    before = acceptance.rate
    acceptance.add(0.0, 0)
    assert acceptance.rate == before


def test_a_reset_returns_to_the_prior() -> None:
    """A new draft inherits nothing from the old one's acceptance."""
    acceptance = Acceptance(ROUTE_MEMORY)
    acceptance.add(0.0, 1000)
    acceptance.reset()
    assert acceptance.rate == pytest.approx(PRIOR_RATE)


def test_rank_rates_follow_the_counts() -> None:
    """Ranks without nodes fall from their predecessor by the prior; a reset forgets all."""
    ranks = RankAcceptance(Acceptance(ROUTE_MEMORY))
    unknown = ranks.rates
    assert unknown[:2] == pytest.approx((PRIOR_RATE, RANK_DECAY * PRIOR_RATE), abs=0.025)
    for node in range(1000):
        ranks.add(3, (0, 2, None, None)[node % 4])
    assert ranks.rates[:3] == pytest.approx((0.25, 0.0, 0.25), abs=0.025)
    assert ranks.rates[3] == pytest.approx(RANK_DECAY * 0.25, abs=0.05)
    assert len(ranks.rates) == MAX_RANK
    ranks.reset()
    assert ranks.rates == unknown
