"""`python -m lab demo` as a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from online.processes import ROOT
from tests.e2e.test_stack import logs


def test_the_demo_ends_with_its_figures(tmp_path: Path) -> None:
    """A short demo on the embedded pair: no failures, unchanged greedy answers, a chart."""
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
