"""A real Celery worker process on a real Redis and database, and the hands to feed it."""

import os
import signal as signals
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from celery import Celery

from online.artifacts import ArtifactStore
from online.connections import CYCLE_TASK, celery_app, signal_buffer
from online.cycles import CycleLedger
from online.database import connect
from online.processes import ROOT, beat_command, end_group, environment, worker_command
from online.redis_buffer import RedisBuffer
from online.registry import Registry
from online.settings import Settings
from online.signals import Signal, encode
from online.tables import Cycle
from online.versions import Candidate
from tests.conftest import copy_into
from tests.tiny import TinyPair

T = TypeVar("T")


class Loop:
    """Everything of the service but the decoder."""

    def __init__(self, settings: Settings, first_draft: Path) -> None:
        self.settings = settings
        database = connect(settings.sql_url)
        self.registry, self.ledger = Registry(database), CycleLedger(database)
        self.buffer: RedisBuffer = signal_buffer(settings)
        self.artifacts = ArtifactStore(settings.artifacts_path)
        self.celery: Celery = celery_app(settings)
        self.registry.ensure_routes(settings.routes)
        digest = self.artifacts.publish(lambda folder: copy_into(first_draft, folder))
        for route in settings.routes:
            self.registry.register_first(route, Candidate(digest, {}, {}, {}, "test"), "test")

    @contextmanager
    def worker(self, **changed: object) -> Iterator["subprocess.Popen[bytes]"]:
        """A worker process in a session of its own, as the stack starts it."""
        settings = self.settings.model_copy(update=changed)
        process = self._start(worker_command(), settings)
        try:
            yield process
        finally:
            end_group(process)

    @contextmanager
    def beat(self) -> Iterator[None]:
        process = self._start(beat_command(self.settings), self.settings)
        try:
            yield
        finally:
            end_group(process)

    def _start(self, command: list[str], settings: Settings) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(settings), start_new_session=True
        )

    def feed(self, examples: Iterable[Signal | bytes], route: str = "default") -> None:
        for example in examples:
            self.buffer.append(route, example if isinstance(example, bytes) else encode(example))

    def start_cycle(self, route: str = "default") -> int:
        cycle, _ = self.ledger.request(route, "test")
        self.send(cycle.id)
        return cycle.id

    def send(self, cycle_id: int) -> None:
        self.celery.send_task(CYCLE_TASK, args=[cycle_id])

    def finished(self, cycle_id: int, timeout_s: float = 240) -> Cycle:
        """The cycle, once it has ended."""
        return until(
            lambda: c if (c := self.ledger.cycle(cycle_id)).finished_at else None, timeout_s
        )

    def training(self, cycle_id: int) -> int:
        """The pid of the cycle's process, once it has claimed its window."""
        until(lambda: self.ledger.cycle(cycle_id).window_last)
        ours = psutil.Process().children(recursive=True)  # others may run these tests beside us
        found = [p.pid for p in ours if _works_on(p, cycle_id)]
        assert len(found) == 1
        return found[0]


def _works_on(process: psutil.Process, cycle_id: int) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False  # it has ended
    return "trainer.cycle" in line and line[line.index("--cycle") + 1] == str(cycle_id)


def until(look: Callable[[], T | None], timeout_s: float = 60) -> T:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    pytest.fail(f"nothing after {timeout_s} s")


def kill(pid: int) -> None:
    os.kill(pid, signals.SIGKILL)


@pytest.fixture
def loop(
    database: object, database_url: str, redis_url: str, pair: TinyPair, tmp_path: Path
) -> Loop:
    """A route whose first draft knows nothing, on SQLite and on PostgreSQL."""
    return make_loop(database_url, redis_url, pair, tmp_path)


@pytest.fixture
def sqlite_loop(sqlite: object, redis_url: str, pair: TinyPair, tmp_path: Path) -> Loop:
    """The same on SQLite alone."""
    return make_loop(f"sqlite:///{tmp_path}/slipstream.db", redis_url, pair, tmp_path)


def make_loop(database_url: str, redis_url: str, pair: TinyPair, folder: Path) -> Loop:
    settings = Settings(
        data_dir=folder,
        database_url=database_url,
        redis_url=redis_url,
        target=str(pair.target),
        draft=str(pair.spoilt),
        lease_s=2,
        tick_s=0.5,
        cycle_min_signals=50,
        recipe={"learning_rate": 3e-3, "epochs": 4},
        search_recipe=False,
        trainer_threads=2,
        canary_share=0,  # a candidate that passes the gate is active when its cycle ends
    )
    return Loop(settings, pair.spoilt)
