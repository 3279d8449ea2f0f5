"""Lenient and exact requests in one batch of the engine."""

from dataclasses import replace

from online.messages import Lenience
from tests.engines import bench, query
from tests.tiny import TinyPair


def test_lenient_answers_keep_more_and_leave_their_neighbours_alone(pair: TinyPair) -> None:
    """Of a poor draft, at the same seeds: the exact answers are what they are without company."""
    asked = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}
    exact = [query((40 + i, 50, 60), f"exact{i}", seed=i, **asked) for i in range(3)]
    lenient = [
        replace(one, id=f"lenient{i}", lenience=Lenience("lin", 0.05))
        for i, one in enumerate(exact)
    ]
    with bench(pair, drafts={"default": pair.spoilt}) as tiny:
        alone, together = tiny.run(*exact), tiny.run(*exact, *lenient)
    assert [one.ids for one in together[:3]] == [one.ids for one in alone]
    kept, kept_leniently = (
        sum(one.stats.accepted for one in part) for part in (together[:3], together[3:])
    )
    assert kept_leniently > 1.5 * kept
