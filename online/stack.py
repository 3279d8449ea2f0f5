"""The whole service on one machine: Redis, migrations, decoder, worker and beat as children.

`slipstream up` runs it. Ctrl-C ends every child, and so does any other end of this process.
"""

import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from online.embedded_redis import start_server
from online.errors import Unavailable
from online.processes import (
    ROOT,
    beat_command,
    decoder_command,
    die_with_parent,
    end_group,
    environment,
    free_port,
    worker_command,
)
from online.settings import Settings

log = logging.getLogger("slipstream.stack")

READY_LIMIT_S = 120.0
RESTART_PAUSE_S = 2.0


class Stack:
    """The children by name. Inside this context manager, `settings` are complete."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, list[str]] = {}
        self._restart_at: dict[str, float] = {}
        self.logs = settings.data_dir.absolute() / "logs"

    @property
    def url(self) -> str:
        host = self.settings.bind_host.replace("0.0.0.0", "127.0.0.1")
        return f"http://{host}:{self.settings.port}"

    def __enter__(self) -> "Stack":
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            self._start_redis()
            if not self.settings.port:
                self.settings = self.settings.model_copy(update={"port": free_port()})
            self._migrate()
            self.start("decoder", decoder_command())
            self.start("worker", worker_command())
            self.start("beat", beat_command(self.settings))
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, command: list[str]) -> None:
        """Starts a child in its own session.

        The terminal's Ctrl-C then reaches only this process, which ends the children in order.
        """
        self._commands[name] = command
        self.children[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(self.settings),
            stdout=self._log(name),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    def watch(self) -> None:
        """Restarts children that ended, except the decoder: without it there is no service.

        Raises:
            Unavailable: the decoder ended.
        """
        for name, child in list(self.children.items()):
            if child.poll() is None:
                continue
            if name == "decoder":
                status = child.returncode
                raise Unavailable(f"the decoder ended with {status}; see {self._decoder_log}")
            if time.monotonic() >= self._restart_at.get(name, 0):
                log.warning("%s ended with %s; restarting it", name, child.returncode)
                self._restart_at[name] = time.monotonic() + RESTART_PAUSE_S
                self.start(name, self._commands[name])

    def stop(self) -> None:
        """Ends every child and its own children: SIGTERM first, then SIGKILL."""
        for name in ("beat", "worker", "decoder", "redis"):
            if (child := self.children.pop(name, None)) is not None:
                end_group(child)

    def _start_redis(self) -> None:
        if self.settings.redis_url:
            return
        needed = self.settings.redis_bytes(len(self.settings.served_routes))
        process, url = start_server(self.settings.data_dir.absolute() / "redis", max_bytes=needed)
        self.children["redis"] = process
        self._commands["redis"] = list(process.args)  # type: ignore[arg-type]
        self.settings = self.settings.model_copy(update={"redis_url": url})

    def _migrate(self) -> None:
        command = [sys.executable, "-m", "online.cli", "migrate"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(self.settings), capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable(f"the database could not be migrated:\n{done.stderr}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_LIMIT_S
        while time.monotonic() < deadline:
            self.watch()
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise Unavailable(
            f"the decoder was not ready after {READY_LIMIT_S:.0f} s; see {self._decoder_log}"
        )

    @property
    def _decoder_log(self) -> Path:
        return self.logs / "decoder.log"

    def _log(self, name: str) -> IO[bytes]:
        return (self.logs / f"{name}.log").open("ab")
