"""The whole service as `make serve` runs it: real processes, started and ended together."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from online.processes import ROOT
from tests.loop.conftest import until
from tests.tiny import TinyPair


@contextmanager
def up(folder: Path, **variables: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """Runs `slipstream up` in an empty folder. Yields its process and URL.

    `variables` are settings; the others have embedded defaults.
    """
    given = {
        "DATA_DIR": folder,
        "PORT": 0,
        "POLL_S": 0.2,
        "TICK_S": 0.5,
        "MAX_CONTEXT": 256,
        **variables,
    }
    settings = {f"SLIPSTREAM_{name.upper()}": str(value) for name, value in given.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "online.cli", "up"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving on (http://\S+)", line):
                yield process, found[1]
                return
        pytest.fail(f"the stack did not start: {logs(folder)}")
    finally:
        process.kill()
        process.wait()


def logs(folder: Path) -> str:
    return "\n".join(
        f"── {log.name}\n{log.read_text()[-2000:]}"
        for log in sorted((folder / "logs").glob("*.log"))
    )


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_it_ends_every_child(pair: TinyPair, tmp_path: Path, how: signal.Signals) -> None:
    """By Ctrl-C, `kill` and even `kill -9`."""
    with up(tmp_path, target=pair.target, draft=pair.draft) as (process, url):
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 4}).status_code
            == 200
        )
        children = family(process)
        assert len(children) >= 4
        process.send_signal(how)
        process.wait(30)
        until(lambda: gone(children), 30)
        assert process.returncode == (-9 if how is signal.SIGKILL else 0)


def test_the_loop_closes_and_survives_a_killed_worker(pair: TinyPair, tmp_path: Path) -> None:
    """A worker is killed during a cycle. The cycle still makes a better draft.

    A restart loads that draft.
    """
    variables = {
        "target": pair.target,
        "draft": pair.spoilt,
        "cycle_min_signals": 80,
        "lease_s": 2,
        # Long enough to be killed in the middle.
        "recipe": '{"learning_rate": 3e-3, "epochs": 60}',
        # There are no requests during the cycle, so no canary would be decided.
        "canary_share": 0,
    }
    with up(tmp_path, **variables) as (process, url), client(url) as http:
        for i in range(80):
            ask(http, i)
        cycle = until(lambda: training(http))
        worker_of(process).kill()
        route = until(lambda: with_new_draft(http), 240)
        assert route["loaded_version"] == route["active_version"] == 2
        done = http.get("/admin/cycles").json()["cycles"][-1]
        found = (done["id"], done["state"], done["attempts"])
        assert found == (cycle["id"], "promoted", 2), logs(tmp_path)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    with up(tmp_path, **variables) as (_, url), client(url) as http:
        loaded = until(lambda: http.get("/admin/routes/default").json().get("loaded_version"))
        assert loaded == 2, "a restart serves the active version"


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60)


def ask(http: httpx.Client, i: int) -> None:
    body = {"prompt": f"{i} def f{i % 7}(", "max_tokens": 40, "seed": i, "temperature": 1.0}
    http.post("/v1/completions", json=body).raise_for_status()


def training(http: httpx.Client) -> dict[str, Any] | None:
    """The newest cycle, if it has claimed its window."""
    cycles = http.get("/admin/cycles").json()["cycles"]
    return cycles[0] if cycles and cycles[0]["window_last"] else None


def with_new_draft(http: httpx.Client) -> dict[str, Any] | None:
    """The default route, if a new draft is loaded."""
    route: dict[str, Any] = http.get("/admin/routes/default").json()
    return route if route["loaded_version"] > 1 else None


def worker_of(process: "subprocess.Popen[str]") -> psutil.Process:
    lines = ((child, child.cmdline()) for child in family(process))
    return next(child for child, line in lines if {"trainer.tasks", "worker"} <= set(line))


def test_a_decoder_that_dies_ends_the_stack(pair: TinyPair, tmp_path: Path) -> None:
    """There is no service without it. The command fails."""
    with up(tmp_path, target=pair.target, draft=pair.draft) as (process, _):
        children = family(process)
        next(p for p in children if "decoder.serve" in p.cmdline()).kill()
        assert process.wait(20) != 0
        until(lambda: gone(children), 30)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SLIPSTREAM_GAMMA", "99", "SLIPSTREAM_GAMMA"),
        ("SLIPSTREAM_ROUTES", "Not OK", "SLIPSTREAM_ROUTES"),
        ("SLIPSTREAM_ADMIN_KEYS", "my-secret-key", "name:sha256"),
        ("SLIPSTREAM_TARGET", "/no/such/model", "decoder.log"),
    ],
)
def test_invalid_settings_are_named(tmp_path: Path, variable: str, value: str, said: str) -> None:
    """By their variable. An unhashed key is not repeated."""
    env = {
        **os.environ,
        "SLIPSTREAM_DATA_DIR": str(tmp_path),
        "SLIPSTREAM_PORT": "0",
        variable: value,
    }
    done = subprocess.run(
        [sys.executable, "-m", "online.cli", "up"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert "my-secret-key" not in done.stderr
    assert "Traceback" not in done.stderr
