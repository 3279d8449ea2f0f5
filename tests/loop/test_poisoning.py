"""A window flooded with unrelated text, and the draft after its cycle."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from online.artifacts import ArtifactStore
from online.buffer import BufferLimits
from online.cycles import CycleLedger
from online.database import connect
from online.memory_buffer import MemoryBuffer
from online.registry import Registry
from online.settings import Settings
from online.signals import Signal, encode
from online.tables import Cycle
from online.versions import Candidate
from tests.conftest import copy_into
from tests.signals import taught
from tests.tiny import TinyPair
from trainer import cycle
from trainer.evaluation import evaluate

BASE, FLOOD = (4, 150), (150, 300)
UNGUARDED = {
    "client_share": 1.0, "forgetting_tolerance": 1.0, "replay_signals": 0,
    "recipe": {"learning_rate": 3e-3, "epochs": 4, "rehearsal": 0},
}  # fmt: skip


class Workplace:
    """Cycles in this process, over two routes that begin with the same draft."""

    def __init__(
        self, pair: TinyPair, folder: Path, past: Sequence[Signal], **more: object
    ) -> None:
        """`past`: signals of earlier cycles; the last of them made the active drafts."""
        own = {
            "recipe": {"learning_rate": 3e-3, "epochs": 4},
            "search_recipe": False,
            "canary_share": 0,
            **more,
        }
        settings = Settings(data_dir=folder, routes="default,other", **own)  # type: ignore[arg-type]
        database = connect(settings.sql_url)
        self.registry, self.ledger = Registry(database), CycleLedger(database)
        self.buffer, self.artifacts = (
            MemoryBuffer(BufferLimits(10_000, 2**30, 3600)),
            ArtifactStore(settings.artifacts_path),
        )
        self.context = cycle.CycleContext(
            settings, self.registry, self.ledger, self.buffer, self.artifacts
        )
        self.registry.ensure_routes(settings.routes)
        digest = self.artifacts.publish(lambda into: copy_into(pair.draft, into))
        window = {"last": self._past(past)}
        for route in settings.routes:
            self.registry.register_first(route, Candidate(digest, {}, window, {}, "test"), "test")

    def feed(self, signals: Sequence[Signal], route: str = "default") -> None:
        self.buffer.append(route, *map(encode, signals))

    def _past(self, signals: Sequence[Signal]) -> str:
        self.feed(signals)
        used = self.buffer.claim("default", 10_000)
        self.buffer.keep("default", used, 1000)
        self.buffer.acknowledge("default", [entry.id for entry in used])
        return used[-1].id

    def cycle(self) -> Cycle:
        wanted, _ = self.ledger.request("default", "test")
        lease = self.ledger.take(wanted.id, 60)
        assert lease is not None
        cycle.run(self.context, lease)
        return self.ledger.cycle(wanted.id)

    def tokens_per_step(self, signals: Sequence[Signal]) -> float:
        """Of the route's active draft."""
        active = self.registry.active("default")
        assert active is not None
        module = AutoModelForCausalLM.from_pretrained(
            self.artifacts.verify(active.sha256), dtype=torch.float32
        )
        return float(evaluate(module, signals, 4, 3).tokens_R.mean())

    def other(self) -> tuple[object, ...]:
        """All there is of the other route."""
        active = self.registry.active("other")
        assert active is not None
        weights = self.artifacts.verify(active.sha256).joinpath("model.safetensors").read_bytes()
        waiting = len(self.buffer.unclaimed("other", 1000))
        return (
            active.id,
            active.sha256,
            weights,
            self.buffer.depth("other"),
            waiting,
            self.ledger.cycles("other"),
        )


def flooded(pair: TinyPair, client: str) -> list[Signal]:
    """One request of the base traffic to five of a flood: the same ten random texts over and over.

    Another model answers them, so that they are unrelated to the base traffic, as a large target's
    answers to random text are. The tiny target's own answers are not.
    """
    texts = taught(pair.spoilt, 10, prompt_ids=FLOOD, seed=1, client=client)
    flood = [replace(texts[i % 10], request_id=f"flood{i}") for i in range(250)]
    base = taught(
        pair.target, 50, prompt_ids=BASE, seed=2, name="base", client="" if client else "someone"
    )
    return [s for i, one in enumerate(base) for s in (*flood[5 * i : 5 * i + 5], one)]


@pytest.fixture(scope="module")
def past(pair: TinyPair) -> list[Signal]:
    return taught(pair.target, 120, prompt_ids=BASE, seed=3, name="past")


@pytest.fixture(scope="module")
def measured(pair: TinyPair) -> list[Signal]:
    """Requests of the base traffic that no cycle sees."""
    return taught(pair.target, 60, prompt_ids=BASE, seed=4, name="measured")


def test_a_client_that_floods_a_window_does_not_spoil_the_draft_for_others(
    sqlite: object, pair: TinyPair, tmp_path: Path, past: list[Signal], measured: list[Signal]
) -> None:
    """The base traffic keeps its tokens per step, within the tolerance; no other route changes."""
    work = Workplace(pair, tmp_path, past)
    work.feed(flooded(pair, client="flooder"))
    work.feed(taught(pair.target, 10, name="other"), "other")
    before, other = work.tokens_per_step(measured), work.other()
    done = work.cycle()
    assert done.report["window"]["left_out"]["lessons"] > 0
    assert work.tokens_per_step(measured) >= before * (
        1 - work.context.settings.forgetting_tolerance
    )
    assert work.other() == other


def test_a_flood_of_nobodys_is_stopped_by_what_would_be_forgotten(
    sqlite: object, pair: TinyPair, tmp_path: Path, past: list[Signal], measured: list[Signal]
) -> None:
    """Better on the new traffic, most of which is the flood; refused for the earlier."""
    work = Workplace(pair, tmp_path, past, replay_signals=0)
    work.feed(flooded(pair, client=""))
    before = work.tokens_per_step(measured)
    done = work.cycle()
    gate = done.report["gate"]
    assert (done.state, gate["gain_low"] > 0, gate["reason"].startswith("forgets")) == (
        "rejected",
        True,
        True,
    )
    assert work.tokens_per_step(measured) == before


def test_without_either_guard_the_flood_would_spoil_it(
    sqlite: object, pair: TinyPair, tmp_path: Path, past: list[Signal], measured: list[Signal]
) -> None:
    """The flood of these tests does harm: what they show is not that it is harmless."""
    work = Workplace(pair, tmp_path, past, **UNGUARDED)
    work.feed(flooded(pair, client="flooder"))
    before = work.tokens_per_step(measured)
    assert work.cycle().state == "promoted"
    assert work.tokens_per_step(measured) < before * 0.9
