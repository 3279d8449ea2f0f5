"""Connections and transactions, the same on SQLite and PostgreSQL."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, DateTime, Dialect, Engine, TypeDecorator, create_engine, event
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from online.errors import InvalidRequest, Unavailable


class UtcDateTime(TypeDecorator[datetime]):
    """Times with time zone UTC on every database. SQLite by itself returns naive times."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


def now() -> datetime:
    return datetime.now(UTC)


def connect(url: str) -> Engine:
    """An engine for the URL. Creating it opens no connection."""
    if url.startswith("sqlite"):
        return _connect_sqlite(url)
    return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 3})


def _connect_sqlite(url: str) -> Engine:
    """SQLite with WAL and foreign keys. Writers wait for each other instead of failing."""
    engine = create_engine(url, connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: object) -> None:
        # The driver must not begin transactions by itself: `_begin` does.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once if another writer came in
        # between, whatever the timeout. One that takes the write lock at its start waits.
        immediate = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def transaction(engine: Engine, *, writes: bool) -> Iterator[Session]:
    """A session that commits at its end. Its rows stay readable afterwards.

    Raises:
        Unavailable: the database can't be reached.
        InvalidRequest: the database can't store a value (PostgreSQL refuses NUL in text).
    """
    bound = engine.execution_options(writes=writes)
    try:
        with Session(bound, expire_on_commit=False) as session, session.begin():
            yield session
    except OperationalError as error:
        message = f"the database can't be reached: {error.orig}"
        raise Unavailable(message, code="database_unavailable") from error
    except DataError as error:
        raise InvalidRequest(f"the database can't keep this value: {error.orig}") from error
