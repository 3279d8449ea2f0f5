"""The whole service as `make serve` runs it: real processes, started and ended by one command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from online.processes import ROOT
from tests.loop.conftest import until
from tests.tiny import TinyPair


@contextmanager
def up(folder: Path, **variables: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """`slipstream up` in an empty folder, on embedded defaults but for what is given; the process and its URL."""
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
def test_ending_it_leaves_no_child(pair: TinyPair, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C, `kill`, even `kill -9`: Redis, decoder, worker and beat are gone with it."""
    with up(tmp_path, target=pair.target, draft=pair.draft) as (process, url):
        assert (
            httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 4}).status_code
            == 200
        )
        children = family(process)
        assert len(children) >= 4
        process.send_signal(how)
        process.wait(30)
        until(lambda: gone(children), 15)
        assert process.returncode == (-9 if how is signal.SIGKILL else 0)


def test_the_loop_closes_and_survives_a_killed_worker(pair: TinyPair, tmp_path: Path) -> None:
    """Traffic in, kill -9 of the worker in the middle of a cycle, a better draft out; another run finds it again."""
    variables = {"target": pair.target, "draft": pair.spoilt, "cycle_min_signals": 80, "lease_s": 2}
    variables |= {
        "recipe": '{"learning_rate": 3e-3, "epochs": 200}'
    }  # long enough to be killed in the middle
    variables["canary_share"] = 0  # nobody asks while it learns, so no canary would be decided
    with (
        up(tmp_path, **variables) as (process, url),
        httpx.Client(base_url=url, timeout=60) as http,
    ):

        def ask(i: int) -> float:
            body = {"prompt": f"{i} def f{i % 7}(", "max_tokens": 40, "seed": i, "temperature": 1.0}
            return float(
                http.post("/v1/completions", json=body)
                .raise_for_status()
                .json()["usage"]["total_tokens"]
            )

        for i in range(80):
            ask(i)
        cycle = until(
            lambda: (
                c[0]
                if (c := http.get("/admin/cycles").json()["cycles"]) and c[0]["window_last"]
                else None
            )
        )
        worker = next(
            p for p in family(process) if "trainer.tasks" in p.cmdline() and "worker" in p.cmdline()
        )
        worker.kill()
        route = until(
            lambda: (
                r if (r := http.get("/admin/routes/default").json())["loaded_version"] > 1 else None
            ),
            120,
        )
        assert route["loaded_version"] == route["active_version"] == 2
        done = http.get("/admin/cycles").json()["cycles"][-1]
        assert (done["id"], done["state"], done["attempts"]) == (cycle["id"], "promoted", 2), logs(
            tmp_path
        )
        process.send_signal(signal.SIGINT)
        process.wait(30)
    with up(tmp_path, **variables) as (_, url):
        loaded = until(
            lambda: httpx.get(f"{url}/admin/routes/default").json().get("loaded_version")
        )
        assert loaded == 2, "a restart serves what was active"


def test_a_decoder_that_dies_ends_the_stack_with_a_word(pair: TinyPair, tmp_path: Path) -> None:
    """Without it there is no service: the command fails and says where to look."""
    with up(tmp_path, target=pair.target, draft=pair.draft) as (process, _):
        children = family(process)
        next(p for p in children if "decoder.serve" in p.cmdline()).kill()
        assert process.wait(20) != 0
        until(lambda: gone(children), 15)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SLIPSTREAM_GAMMA", "99", "SLIPSTREAM_GAMMA"),
        ("SLIPSTREAM_ROUTES", "Not OK", "SLIPSTREAM_ROUTES"),
        ("SLIPSTREAM_ADMIN_KEYS", "my-secret-key", "name:sha256"),
        ("SLIPSTREAM_TARGET", "/no/such/model", "decoder.log"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, variable: str, value: str, said: str) -> None:
    """By their variable; a key that someone pasted unhashed is not repeated."""
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


def test_the_demo_ends_with_its_figures(tmp_path: Path) -> None:
    """A short one, on the embedded pair: no failed request, greedy answers unchanged, a chart on disk."""
    env = {**os.environ, "SLIPSTREAM_DATA_DIR": str(tmp_path), "SLIPSTREAM_CYCLE_MIN_SIGNALS": "40"}
    command = [
        sys.executable,
        "-m",
        "lab",
        "demo",
        "--requests=60",
        "--held-out=8",
        "--max-tokens=24",
    ]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + logs(tmp_path / "demo")
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["failed_requests"] == 0
    assert figures["requests"] == 60 + 4 * 8
    assert figures["greedy_same"] == figures["greedy_compared"] == 8
    assert 1 <= figures["tau_before"] <= 5
    assert 0 < figures["acceptance_before"] < 1
    assert figures["seconds"] <= time.monotonic() - started
    assert Path(figures["chart"]).read_bytes().startswith(b"\x89PNG")
