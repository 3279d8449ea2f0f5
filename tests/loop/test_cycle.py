"""Training cycles in a real worker process: one window makes one version, despite any crash."""

import shutil
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from online.canaries import CanaryLedger
from online.database import connect, transaction
from online.signals import Signal
from online.versions import Candidate, add_version
from tests.conftest import copy_into
from tests.loop.conftest import Loop, kill, until
from tests.signals import taught
from tests.tiny import TinyPair
from trainer.context import CycleContext

MANY = "99999999999999-0"


@pytest.fixture(scope="session")
def examples(pair: TinyPair) -> list[Signal]:
    """200 requests that the target answered."""
    return taught(pair.target, 200)


def active(loop: Loop) -> int:
    found = loop.registry.active("default")
    assert found is not None
    return found.id


def test_a_cycle_learns_registers_and_activates(loop: Loop, examples: list[Signal]) -> None:
    """Signals become an active version with parent, window, recipe, gate report and digest."""
    loop.feed(examples)
    first = active(loop)
    with loop.worker():
        cycle = loop.finished(loop.start_cycle())
    assert (cycle.state, cycle.attempts, cycle.error) == ("promoted", 1, "")
    version = loop.registry.version(active(loop))
    assert (version.parent_id, version.cycle_id) == (first, cycle.id)
    assert version.gate["gain_low"] > 0
    assert version.window["signals"] == 200
    assert version.window["trained_on"] + version.gate["requests"] == 200
    assert version.recipe["divergence"] == "forward_kl"
    assert loop.artifacts.verify(version.sha256).joinpath("model.safetensors").stat().st_size > 1000
    assert loop.buffer.claim("default", 1) == []


def test_a_candidate_goes_on_trial_and_beat_rests_until_its_end(
    sqlite_loop: Loop, examples: list[Signal]
) -> None:
    """With a canary share nothing is active at once; new signals wait for the next cycle."""
    canaries = CanaryLedger(connect(sqlite_loop.settings.sql_url))
    sqlite_loop.settings = sqlite_loop.settings.model_copy(update={"canary_share": 0.25})
    with sqlite_loop.worker(), sqlite_loop.beat():
        sqlite_loop.feed(examples[:120])
        cycle = sqlite_loop.finished(until(lambda: sqlite_loop.ledger.cycles("default"))[0].id)
        canary = canaries.require("default")
        assert (cycle.state, canary.version, canary.share) == (
            "canary",
            cycle.report["version"],
            0.25,
        )
        assert active(sqlite_loop) == canary.beside_version == 1
        sqlite_loop.feed(examples[120:])
        time.sleep(2)
        assert len(sqlite_loop.ledger.cycles("default")) == 1
        canaries.finish(canary, "promoted", "canary", "better")
        second = sqlite_loop.finished(
            until(lambda: c[0] if len(c := sqlite_loop.ledger.cycles()) == 2 else None).id
        )
    assert sqlite_loop.registry.version(second.report["version"]).parent_id == canary.version
    assert active(sqlite_loop) == canary.version


def test_delivered_often_it_makes_one_version(sqlite_loop: Loop, examples: list[Signal]) -> None:
    """Two workers, the same task five times."""
    sqlite_loop.feed(examples[:120])
    with sqlite_loop.worker(), sqlite_loop.worker():
        cycle_id = sqlite_loop.start_cycle()
        for _ in range(4):
            sqlite_loop.send(cycle_id)
        cycle = sqlite_loop.finished(cycle_id)
        until(
            lambda: (
                sqlite_loop.celery.connection()
                .default_channel.queue_declare("slipstream")
                .message_count
                == 0
            )
        )
        assert sqlite_loop.ledger.request("default", "test")[1], (
            "the finished cycle is still in the way"
        )
    assert cycle.attempts == 1
    assert len(sqlite_loop.registry.versions("default")) == 2


def test_a_killed_training_process_is_tried_again_on_the_same_window(
    loop: Loop, examples: list[Signal]
) -> None:
    """kill -9 in the middle: the reason is kept, nothing is lost, nothing is made twice."""
    loop.feed(examples)
    with loop.worker(recipe={"epochs": 300}):
        cycle_id = loop.start_cycle()
        kill(loop.training(cycle_id))
        failed = until(lambda: c if (c := loop.ledger.cycle(cycle_id)).error else None)
    assert (failed.state, failed.error) == ("queued", "the cycle's process ended with -9")
    window = (failed.window_first, failed.window_last)
    loop.feed(examples[:5])
    with loop.worker():
        loop.send(cycle_id)
        cycle = loop.finished(cycle_id)
    assert (cycle.state, cycle.attempts, cycle.window_first, cycle.window_last) == (
        "promoted",
        2,
        *window,
    )
    assert len(loop.registry.versions("default")) == 2
    assert len(loop.buffer.claim("default", 100)) == 5


def test_a_killed_worker_takes_its_training_along_and_the_next_one_goes_on(
    sqlite_loop: Loop, examples: list[Signal]
) -> None:
    """kill -9 of the worker: its pool and training end too; Redis delivers the task again."""
    sqlite_loop.feed(examples)
    with sqlite_loop.worker(recipe={"epochs": 300}) as worker:
        cycle_id = sqlite_loop.start_cycle()
        training = sqlite_loop.training(cycle_id)
        kill(worker.pid)
        until(lambda: not _alive(training), 20)
    with sqlite_loop.beat(), sqlite_loop.worker():
        cycle = sqlite_loop.finished(cycle_id)
    assert (cycle.state, cycle.attempts) == ("promoted", 2)
    assert len(sqlite_loop.registry.versions("default")) == 2


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_window_whose_acknowledgement_was_lost_is_not_used_again(
    sqlite_loop: Loop, examples: list[Signal]
) -> None:
    """The version is registered, Redis still has the window pending: the next cycle skips it."""
    sqlite_loop.feed(examples[:60])
    pending = sqlite_loop.buffer.claim("default", 100)
    cycle, _ = sqlite_loop.ledger.request("default", "test")
    lease = sqlite_loop.ledger.take(cycle.id, 5)
    assert lease is not None
    sqlite_loop.ledger.set_window(lease, pending[0].id, pending[-1].id)
    sqlite_loop.ledger.finish(lease, "rejected", {})
    sqlite_loop.feed(examples[60:120])
    with sqlite_loop.worker():
        cycle = sqlite_loop.finished(sqlite_loop.start_cycle())
    assert cycle.report["window"]["signals"] == 60
    assert cycle.report["window"]["first"] > pending[-1].id


def test_a_candidate_made_worse_is_refused(
    sqlite_loop: Loop, examples: list[Signal], pair: TinyPair
) -> None:
    """A learning rate that ruins the draft: registered with its report, never active."""
    sqlite_loop.feed(examples)
    with sqlite_loop.worker(recipe={"learning_rate": 30.0}):
        cycle = sqlite_loop.finished(sqlite_loop.start_cycle())
    assert cycle.state == "rejected"
    assert active(sqlite_loop) == 1
    refused = sqlite_loop.registry.versions("default")[0]
    assert not refused.gate["promote"]


def test_poison_is_left_out_and_counted(sqlite_loop: Loop, examples: list[Signal]) -> None:
    """Records that are no signals, or of another target, do not stop a cycle."""
    sqlite_loop.feed([b"", b"junk", *examples[:60], b"\xff" * 100])
    with sqlite_loop.worker():
        cycle = sqlite_loop.finished(sqlite_loop.start_cycle())
        assert cycle.report["window"]["unreadable"] == 3
        assert cycle.state in ("promoted", "rejected")
        sqlite_loop.feed([b"junk"] * 5)
        assert sqlite_loop.finished(sqlite_loop.start_cycle()).state == "empty"
        assert sqlite_loop.finished(sqlite_loop.start_cycle()).report["reason"] == "no signals"


def test_a_missing_parent_is_named_and_given_up(sqlite_loop: Loop, examples: list[Signal]) -> None:
    """The ledger says what was wrong; after three attempts the loop goes on without this window."""
    sqlite_loop.feed(examples[:60])
    parent = sqlite_loop.registry.version(1)
    sqlite_loop.artifacts.path(parent.sha256).rename(sqlite_loop.artifacts.root / "gone")
    with sqlite_loop.worker(), sqlite_loop.beat():
        cycle = sqlite_loop.finished(sqlite_loop.start_cycle())
    assert cycle.state == "failed"
    assert f"artifact {parent.sha256[:12]} is missing" in cycle.error
    assert active(sqlite_loop) == 1


def test_training_has_a_time_limit_and_the_worker_still_answers(
    sqlite_loop: Loop, examples: list[Signal]
) -> None:
    """A ping during training is answered; what takes too long is killed, with the reason."""
    sqlite_loop.feed(examples)
    with sqlite_loop.worker(recipe={"epochs": 5000}, cycle_limit_s=12):
        cycle_id = sqlite_loop.start_cycle()
        sqlite_loop.training(cycle_id)
        assert sqlite_loop.celery.control.ping(timeout=3)
        killed = until(lambda: c if (c := sqlite_loop.ledger.cycle(cycle_id)).error else None)
    assert killed.error == "killed after 12 s"


def test_beat_starts_cycles_by_itself_and_rests_when_nothing_is_new(
    sqlite_loop: Loop, examples: list[Signal]
) -> None:
    """Below the threshold nothing happens; above it a cycle starts; after it the loop rests."""
    sqlite_loop.feed(examples[:49])
    with sqlite_loop.worker(), sqlite_loop.beat():
        time.sleep(5)
        assert sqlite_loop.ledger.cycles("default") == []
        sqlite_loop.feed(examples[49:120])
        cycle = sqlite_loop.finished(until(lambda: sqlite_loop.ledger.cycles("default"))[0].id)
        assert (cycle.actor, cycle.state) == ("beat", "promoted")
        time.sleep(2)
        assert len(sqlite_loop.ledger.cycles("default")) == 1


def test_the_first_draft_is_what_every_version_rehearses(sqlite_loop: Loop, pair: TinyPair) -> None:
    """Not the parent; where its artifact is gone, that is no reason not to learn."""
    loop, context = sqlite_loop, CycleContext.of(sqlite_loop.settings)
    first = loop.registry.active("default")
    assert first is not None
    digest = loop.artifacts.publish(lambda folder: copy_into(pair.target, folder))
    made = Candidate(digest, {}, {}, {}, "test")
    with transaction(connect(loop.settings.sql_url), writes=True) as session:
        add_version(session, "default", made, "test", parent_id=first.id, cycle_id=None)
    found = context.weights.first("default")
    assert found is not None
    weights = AutoModelForCausalLM.from_pretrained(loop.artifacts.path(first.sha256)).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
    shutil.rmtree(loop.artifacts.path(first.sha256))
    assert context.weights.first("default") is None
