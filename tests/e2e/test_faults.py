"""Generation continues if clients leave, Redis is down or the database is away."""

import time
from pathlib import Path

import httpx
import pytest

from lab.stored import stored
from online.embedded_redis import start_server
from online.errors import Unavailable
from online.processes import free_port
from online.signals import decode, pseudonym
from tests.e2e.conftest import Served, serve, tiny_settings
from tests.loop.conftest import until
from tests.tiny import TinyPair

LONG = {
    "prompt": "x",
    "max_tokens": 250,
    "ignore_eos": True,
    "temperature": 1,
    "speculation": {"gamma": 0},
}


def running(served: Served) -> int:
    found: int = served.http.get("/ready").json()["running"]
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(own: Served, stream: bool) -> None:
    """Whether it was reading a stream or waiting for a whole answer."""
    body = {**LONG, "n": 16, "stream": stream}
    with httpx.Client(timeout=httpx.Timeout(30, read=0.1)) as client:
        try:
            with client.stream("POST", f"{own.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        except httpx.ReadTimeout:
            pass
    cancelled = 'vllm:request_success_total{finished_reason="cancelled",model_name="tiny"} 16.0'
    until(lambda: cancelled in own.http.get("/metrics").text)
    assert running(own) == 0
    assert own.complete()["usage"]["completion_tokens"] > 0


def test_a_full_queue_is_429(pair: TinyPair, redis_url: str, tmp_path: Path) -> None:
    """Also for a stream: the status is known before it starts."""
    with serve(tiny_settings(pair, tmp_path, redis_url, slots=1, max_waiting=1)) as served:
        for stream in (False, True):
            answer = served.post("/v1/completions", **{**LONG, "n": 8, "stream": stream})
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
        until(lambda: running(served) == 0)
        assert served.complete()


def test_redis_may_fail_and_return_under_load(pair: TinyPair, tmp_path: Path) -> None:
    """No request fails. Signals are dropped and counted until Redis is back."""
    port = free_port()
    server, url = start_server(tmp_path / "redis", port)
    with serve(tiny_settings(pair, tmp_path, url)) as served:
        served.complete()
        until(lambda: served.buffer.depth("default").signals == 1)
        server.kill()
        server.wait()
        started = time.monotonic()
        while time.monotonic() - started < 3:
            served.complete()
        assert served.http.get("/admin/routes/default").json()["buffer"]["error"]
        assert served.http.get("/metrics").status_code == 200
        assert (
            'slipstream_signals_dropped_total{reason="redis_down",route="default"}'
            in served.http.get("/metrics").text
        )
        cycle = served.post("/admin/routes/default/cycles", reason="while it is down")
        assert (cycle.status_code, cycle.json()["error"]["code"]) == (503, "queue_unavailable")
        server, _ = start_server(tmp_path / "redis", port)
        try:
            until(lambda: served.complete() and served.buffer.depth("default").signals > 1)
        finally:
            server.kill()


def test_a_rollback_needs_neither_redis_nor_trainer(pair: TinyPair, tmp_path: Path) -> None:
    """It takes effect within two seconds."""
    server, url = start_server(tmp_path / "redis")
    with serve(tiny_settings(pair, tmp_path, url)) as served:
        served.activate(served.register(pair.spoilt))
        server.kill()
        server.wait()
        started = time.monotonic()
        assert served.post("/admin/routes/default/rollback", reason="3 a.m.").status_code == 200
        served.running(1)
        assert time.monotonic() - started < 2


def test_a_database_that_goes_away_stops_no_generation(own: Served) -> None:
    """Admin calls fail with 503. The loaded drafts continue."""
    database = own.settings.data_dir / "slipstream.db"
    hidden = database.with_suffix(".hidden")
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    database.rename(hidden)
    database.mkdir()
    try:
        own.registry._engine.dispose()
        with pytest.raises(Unavailable):
            own.registry.routes()
        time.sleep(1)
        assert own.complete()["usage"]["completion_tokens"] > 0
        assert own.http.get("/health").status_code == 200
        assert own.http.get("/metrics").status_code == 200
    finally:
        database.rmdir()
        hidden.rename(database)


def test_some_requests_leave_no_signal(own: Served) -> None:
    """Those with `store: false` and those of closed routes."""
    own.complete("secret", store=False)
    own.complete("closed", metadata={"route": "closed"})
    kept = own.complete("public")
    until(lambda: own.buffer.depth("default").signals == 1)
    entry = stored(own.buffer, "default")[0]
    signal = decode(entry.record)
    assert signal.request_id.startswith(kept["id"])
    assert len(signal.prompt_ids) == kept["usage"]["prompt_tokens"]
    assert own.buffer.depth("closed").signals == 0


def test_a_signal_has_a_pseudonym_of_its_client(own: Served) -> None:
    """Without keys, the client is OpenAI's `user`. The buffer holds no name."""
    for user in ("alice", "alice", None):
        own.complete("hello", user=user)
    entries = until(
        lambda: e if len(e := stored(own.buffer, "default")) == 3 else None,
        10,
    )
    assert sorted(decode(entry.record).client for entry in entries) == [
        "",
        *[pseudonym("alice")] * 2,
    ]
    assert not any(b"alice" in entry.record for entry in entries)
