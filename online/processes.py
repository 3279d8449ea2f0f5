"""The service's processes: their commands, their environment, and how they start and end."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from online.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
STOP_LIMIT_S = 5.0


def worker_command() -> list[str]:
    return _celery(
        "worker", "--loglevel=warning", "--concurrency=1", "--without-gossip", "--without-mingle"
    )


def beat_command(settings: Settings) -> list[str]:
    schedule = settings.data_dir.absolute() / "beat-schedule"
    return _celery("beat", "--loglevel=warning", f"--schedule={schedule}", "--pidfile=")


def decoder_command() -> list[str]:
    return [sys.executable, "-m", "decoder.serve"]


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", "trainer.tasks", *arguments]


def environment(settings: Settings) -> Mapping[str, str]:
    """The settings as SLIPSTREAM_* variables for a child, on top of what this process was given."""
    own = {}
    for name, value in settings.model_dump(exclude_none=True).items():
        text = (
            ",".join(value)
            if isinstance(value, tuple)
            else json.dumps(value)
            if isinstance(value, dict)
            else value
        )
        own[f"SLIPSTREAM_{name.upper()}"] = str(text)
    return {
        **os.environ,
        **own,
        "PYTHONUNBUFFERED": "1",
        "SLIPSTREAM_DATA_DIR": str(settings.data_dir.absolute()),
    }


def die_with_parent() -> Callable[[], None] | None:
    """On Linux: has the kernel end a child when its parent dies, even by kill -9. Elsewhere None."""
    if sys.platform != "linux":
        return None
    import ctypes  # only here: loaded before the fork, since nothing may be imported after it

    prctl = ctypes.CDLL(None).prctl
    set_death_signal = 1  # PR_SET_PDEATHSIG
    return lambda: prctl(set_death_signal, signal.SIGTERM) and None


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends a child that leads its own session, and every process it started there."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
