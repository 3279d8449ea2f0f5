"""A canary in the engine: some rows draft with it from their first token to their last, and no output shows it."""

from collections.abc import Iterator

import numpy as np
import pytest

from decoder.drafts import LiveDraft, fraction
from tests.engines import Bench, Finished, bench, query, target_alone
from tests.tiny import TinyPair
from tests.unit.test_engine import PROMPTS, Failing

NAMES = [f"q{i}" for i in range(24)]


@pytest.fixture
def tiny(pair: TinyPair) -> Iterator[Bench]:
    """A good draft as version 1, and beside it a spoilt one as version 9."""
    with bench(pair, canary=pair.spoilt) as made:
        yield made


def active(tiny: Bench) -> LiveDraft:
    return tiny.engine.batch.drafts["default"]  # type: ignore[no-any-return]


def room(tiny: Bench) -> LiveDraft:
    found = active(tiny).canary
    assert found is not None
    return found


def run(tiny: Bench, prompt: tuple[int, ...] = PROMPTS[3], **more: object) -> dict[str, Finished]:
    """The same prompt under many names, all at once."""
    return dict(zip(NAMES, tiny.run(*[query(prompt, name, max_tokens=40, **more) for name in NAMES]), strict=True))


def versions(finished: Finished) -> set[int]:
    return {version for _, _, version in finished.stats.versions}


def by_version(found: dict[str, Finished], version: int) -> list[Finished]:
    return [f for f in found.values() if versions(f) == {version}]


def rate(finished: list[Finished]) -> float:
    return float(np.mean([f.stats.acceptance_rate for f in finished]))


def test_a_requests_side_is_a_stable_hash_of_its_id() -> None:
    """Always the same for one name, even over all names, and another one for another canary."""
    drawn = np.array([fraction(f"9:{i}") for i in range(20_000)])
    assert (drawn == [fraction(f"9:{i}") for i in range(20_000)]).all()
    assert abs((drawn < 0.2).mean() - 0.2) < 0.01
    again = np.array([fraction(f"10:{i}") for i in range(20_000)])
    assert abs(((drawn < 0.2) & (again < 0.2)).mean() - 0.04) < 0.01


def test_each_row_drafts_with_the_version_it_was_given(pair: TinyPair, tiny: Bench) -> None:
    """Greedy outputs are the target's in both arms; what is reported and logged is the version that drafted."""
    found = run(tiny)
    for name, finished in found.items():
        assert finished.ids == target_alone(pair, PROMPTS[3], 40)
        assert versions(finished) == {active(tiny).assigned(name).version}
    assert rate(by_version(found, 9)) < rate(by_version(found, 1)) / 2
    logged = {signal.request_id: set(signal.step_version.tolist()) for signal in tiny.signals(len(NAMES))}
    assert logged == {name: versions(finished) for name, finished in found.items()}


def test_without_a_share_nobody_gets_the_canary(tiny: Bench) -> None:
    """Its weights may stay in their room; new requests have the active draft."""
    active(tiny).share = 0.0
    assert {version for finished in run(tiny).values() for version in versions(finished)} == {1}


def test_contexts_are_not_shared_between_versions(pair: TinyPair) -> None:
    """A long prompt that both arms know: each accepts what it would alone, whoever encoded the beginning."""
    prompt = PROMPTS[5]
    with bench(pair, canary=pair.spoilt) as tiny:
        apart = {version: rate(by_version(run(tiny, prompt), version)) for version in (1, 9)}
        warm = run(tiny, prompt)
        assert tiny.counter("vllm:prefix_cache_hits") > 0
    assert {version: rate(by_version(warm, version)) for version in (1, 9)} == pytest.approx(apart, abs=0.02)
    with bench(pair) as alone:
        assert apart[1] == pytest.approx(rate(list(run(alone, prompt).values())), abs=0.02)


def test_a_canary_that_fails_is_left_out_and_nobody_sees_it(pair: TinyPair, tiny: Bench) -> None:
    """Its rows go on without a draft, the others with theirs; whoever comes next gets the active one."""
    room(tiny).model = Failing(room(tiny).model)  # type: ignore[assignment]
    found = run(tiny)
    assert all(finished.ids == target_alone(pair, PROMPTS[3], 40) for finished in found.values())
    assert all(finished.reason == "length" for finished in found.values())
    assert (room(tiny).usable, active(tiny).usable) == (False, True)
    assert {v for finished in run(tiny).values() for v in versions(finished)} == {1}


def test_rows_of_a_canary_end_with_it_when_it_is_promoted(pair: TinyPair, tiny: Bench) -> None:
    """Its weights come into the active draft in the middle: both arms' rows go on, and new ones are all its own."""
    staged = active(tiny).stage(pair.spoilt)
    running = {name: tiny.submit(query(PROMPTS[3], name, max_tokens=120)) for name in NAMES[:8]}

    def promote() -> None:
        active(tiny).install(staged, 9)
        active(tiny).share = 0.0

    tiny.engine.between_steps(promote)
    found = {name: listener.wait() for name, listener in running.items()}
    assert all(finished.ids == target_alone(pair, PROMPTS[3], 120) for finished in found.values())
    assert all(9 in versions(finished) for finished in found.values())
    assert {v for finished in run(tiny).values() for v in versions(finished)} == {9}
