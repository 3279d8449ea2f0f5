"""A canary in the engine: it drafts for whole sequences, and no output shows it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine

from decoder.rollout.canary import CanaryController
from decoder.rollout.installer import Installer
from decoder.rollout.live import LiveDraft, fraction
from online.artifacts import ArtifactStore
from online.canaries import CanaryLedger, open_canary
from online.database import transaction
from online.registry import Registry
from online.rollout import Rules
from online.versions import Candidate, add_version
from tests.conftest import copy_into
from tests.engine.test_engine import PROMPTS, Failing
from tests.engines import Bench, Finished, bench, query, target_alone
from tests.tiny import TinyPair

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
    return dict(
        zip(
            NAMES,
            tiny.run(*[query(prompt, name, max_tokens=40, **more) for name in NAMES]),
            strict=True,
        )
    )


def versions(finished: Finished) -> set[int]:
    return {version for _, _, version in finished.stats.versions}


def by_version(found: dict[str, Finished], version: int) -> list[Finished]:
    return [f for f in found.values() if versions(f) == {version}]


def rate(finished: list[Finished]) -> float:
    return float(np.mean([f.stats.acceptance_rate for f in finished]))


def test_a_requests_side_is_a_stable_hash_of_its_id() -> None:
    """Always the same for one name, even over all names, and another one for another canary."""
    sides = np.array([fraction(f"9:{i}") for i in range(20_000)])
    assert (sides == [fraction(f"9:{i}") for i in range(20_000)]).all()
    assert abs((sides < 0.2).mean() - 0.2) < 0.01
    again = np.array([fraction(f"10:{i}") for i in range(20_000)])
    assert abs(((sides < 0.2) & (again < 0.2)).mean() - 0.04) < 0.01


def test_each_sequence_drafts_with_the_version_it_was_given(pair: TinyPair, tiny: Bench) -> None:
    """Greedy outputs are the target's in both arms; the version that drafted is reported."""
    found = run(tiny)
    for name, finished in found.items():
        assert finished.ids == target_alone(pair, PROMPTS[3], 40)
        assert versions(finished) == {active(tiny).assigned(name).version}
    assert rate(by_version(found, 9)) < rate(by_version(found, 1)) / 2


def test_without_a_share_no_sequence_gets_the_canary(tiny: Bench) -> None:
    """Its weights may stay in their room; new requests have the active draft."""
    active(tiny).share = 0.0
    assert {version for finished in run(tiny).values() for version in versions(finished)} == {1}


def test_contexts_are_not_shared_between_versions(pair: TinyPair) -> None:
    """A long prompt in both arms: each accepts as much as it does alone."""
    prompt = PROMPTS[5]
    with bench(pair, canary=pair.spoilt) as tiny:
        apart = {version: rate(by_version(run(tiny, prompt), version)) for version in (1, 9)}
        warm = run(tiny, prompt)
        assert tiny.counter("vllm:prefix_cache_hits") > 0
    assert {version: rate(by_version(warm, version)) for version in (1, 9)} == pytest.approx(
        apart, abs=0.02
    )
    with bench(pair) as alone:
        assert apart[1] == pytest.approx(rate(list(run(alone, prompt).values())), abs=0.02)


def test_a_canary_that_fails_is_left_out_and_no_client_sees_it(pair: TinyPair, tiny: Bench) -> None:
    """Its sequences go on without a draft; new ones get the active draft."""
    room(tiny).model = Failing(room(tiny).model)  # type: ignore[assignment]
    found = run(tiny)
    assert all(finished.ids == target_alone(pair, PROMPTS[3], 40) for finished in found.values())
    assert all(finished.reason == "length" for finished in found.values())
    assert (room(tiny).usable, active(tiny).usable) == (False, True)
    assert {v for finished in run(tiny).values() for v in versions(finished)} == {1}


def test_sequences_of_a_canary_end_with_it_when_it_is_promoted(pair: TinyPair, tiny: Bench) -> None:
    """Its weights are installed while sequences of both arms run; new ones all use them."""
    staged = active(tiny).stage(pair.spoilt)
    running = {name: tiny.submit(query(PROMPTS[3], name, max_tokens=120)) for name in NAMES[:8]}

    def promote() -> None:
        active(tiny).install(staged, 9)
        active(tiny).share = 0.0

    promoted = tiny.engine.between_steps(promote)
    found = {name: listener.wait() for name, listener in running.items()}
    promoted.result()
    assert all(finished.ids == target_alone(pair, PROMPTS[3], 120) for finished in found.values())
    assert all(9 in versions(finished) for finished in found.values())
    assert {v for finished in run(tiny).values() for v in versions(finished)} == {9}


# ── the ledger's canary on this decoder ──


@dataclass
class Tried:
    """A canary that the ledger says is running, in an engine that has taken it up."""

    tiny: Bench
    canaries: CanaryController
    ledger: CanaryLedger
    version: int


@pytest.fixture
def tried(tiny: Bench, pair: TinyPair, sqlite: Engine, tmp_path: Path) -> Tried:
    registry, ledger, artifacts = (
        Registry(sqlite),
        CanaryLedger(sqlite),
        ArtifactStore(tmp_path / "artifacts"),
    )
    made = Candidate(
        artifacts.publish(lambda folder: copy_into(pair.draft, folder)), {}, {}, {}, "test"
    )
    registry.ensure_routes(("default",))
    registry.register_first("default", made, "test")
    with transaction(sqlite, writes=True) as session:
        version = add_version(session, "default", made, "test", parent_id=1, cycle_id=None).id
        open_canary(session, "default", version, 1, 0.5, "test", "test")
    active(tiny).share = 0.0
    installer = Installer(tiny.engine.between_steps, artifacts, lambda: "same")
    canaries = CanaryController(
        {"default": active(tiny)}, installer, registry, ledger, Rules(20, 400, 0.03), tiny.metrics
    )
    canaries.follow()
    return Tried(tiny, canaries, ledger, version)


def test_a_running_canary_is_loaded_and_gets_its_share(tried: Tried) -> None:
    """With the weights of its version, until the ledger says that it has ended."""
    assert (room(tried.tiny).version, active(tried.tiny).share) == (tried.version, 0.5)
    assert {v for finished in run(tried.tiny).values() for v in versions(finished)} == {
        1,
        tried.version,
    }
    tried.ledger.finish(tried.ledger.require("default"), "aborted", "alice", "enough")
    tried.canaries.follow()
    assert active(tried.tiny).share == 0
    assert tried.canaries.seen("default") is None


def test_requests_that_came_before_the_trial_count_in_neither_arm(tried: Tried) -> None:
    """The canary could not draft for them. Requests of a third version do not count either."""
    now = time.monotonic()
    for version, arrived_s in (
        (1, 0.0),
        (tried.version, 0.0),
        (7, now),
        (1, now),
        (1, now),
        (tried.version, now),
    ):
        tried.canaries.observe("default", version, 0.5, arrived_s)
    seen = tried.canaries.seen("default")
    assert seen is not None
    assert (seen.active.requests, seen.canary.requests) == (2, 1)


def test_a_canary_that_fails_while_it_serves_is_aborted(tried: Tried) -> None:
    """The next requests have the active draft, and the history says why."""
    room(tried.tiny).model = Failing(room(tried.tiny).model)  # type: ignore[assignment]
    assert {finished.reason for finished in run(tried.tiny).values()} == {"length"}
    tried.canaries.follow()
    tried.canaries.follow()
    (canary,) = tried.ledger.canaries()
    assert (canary.state, canary.reason) == ("aborted", "its draft failed while it served")
    assert active(tried.tiny).share == 0
