"""The service's processes: their commands, their environment, and how they start and end."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from online.settings import PREFIX, Settings

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
    """The environment of a child: this process's own, with every setting as a variable."""
    given = settings.model_dump(exclude_none=True)
    given["data_dir"] = settings.data_dir.absolute()
    variables = {PREFIX + name.upper(): _as_variable(value) for name, value in given.items()}
    return {**os.environ, **variables, "PYTHONUNBUFFERED": "1"}


def _as_variable(value: object) -> str:
    """The text that a setting is read from."""
    if isinstance(value, tuple):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` with which the kernel ends a child when its parent dies, even by kill -9.

    None except on Linux.
    """
    if sys.platform != "linux":
        return None
    import ctypes  # before the fork: a child must not import anything

    prctl = ctypes.CDLL(None).prctl
    set_death_signal = 1  # PR_SET_PDEATHSIG
    return lambda: prctl(set_death_signal, signal.SIGTERM) and None


def end_group(child: "subprocess.Popen[bytes]") -> None:
    """Ends a child that leads a session, and every process of that session."""
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
    """A port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
