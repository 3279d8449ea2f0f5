"""The registry's tables, the same on SQLite and PostgreSQL. Migrations live in `migrations/`.

Nothing that happened is ever updated or deleted in `versions`, `activations` and `audit`. A route's active version is
its newest activation, no column.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    Index,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    text,
)
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from online.errors import InvalidRequest, Unavailable

CYCLE_STATES = ("queued", "running", "promoted", "canary", "held", "rejected", "empty", "failed")
CANARY_STATES = ("running", "promoted", "aborted", "superseded")
ACTIVATION_KINDS = ("initial", "promotion", "manual", "rollback", "auto_rollback")
MAX_ID = 2**31 - 1  # largest value of an id column


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database; SQLite alone would give naive times back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[Any] = {datetime: UtcDateTime, dict[str, Any]: JSON}


class Route(Base):
    __tablename__ = "routes"

    name: Mapped[str] = mapped_column(primary_key=True)
    frozen: Mapped[bool] = mapped_column(default=False)  # no automatic promotion or rollback
    created_at: Mapped[datetime] = mapped_column(default=now)


class Version(Base):
    """An immutable draft."""

    __tablename__ = "versions"

    id: Mapped[int] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(ForeignKey("routes.name"), index=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("versions.id"))
    cycle_id: Mapped[int | None] = mapped_column(ForeignKey("cycles.id"), unique=True)
    sha256: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    window: Mapped[dict[str, Any]]  # first and last entry id, counts
    gate: Mapped[dict[str, Any]]
    git_commit: Mapped[str]
    created_by: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Activation(Base):
    """Who made which version active, when and why. `number` counts per route, so two writers can't both be next."""

    __tablename__ = "activations"
    __table_args__ = (
        UniqueConstraint("route", "number"),
        CheckConstraint(f"kind IN {ACTIVATION_KINDS}", name="kind"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(ForeignKey("routes.name"))
    number: Mapped[int]
    from_version: Mapped[int | None] = mapped_column(ForeignKey("versions.id"))
    to_version: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    kind: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Cycle(Base):
    """One attempt to learn from one window. `fence` grows each time a worker takes the cycle over."""

    __tablename__ = "cycles"
    __table_args__ = (
        CheckConstraint(f"state IN {CYCLE_STATES}", name="state"),
        # Single flight: one unfinished cycle per route.
        Index(
            "uq_cycles_unfinished",
            "route",
            unique=True,
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        # The same signals never conclude two cycles.
        UniqueConstraint("route", "window_last"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(ForeignKey("routes.name"))
    state: Mapped[str]
    actor: Mapped[str]
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    heartbeat_at: Mapped[datetime] = mapped_column(default=now)
    window_first: Mapped[str | None]
    window_last: Mapped[str | None]
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str] = mapped_column(default="")
    created_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


class Canary(Base):
    """A candidate that drafts for a share of its route's requests, beside the version that was active when it came.

    `actor` and `reason` are of its end once it has one; who began it is in the audit.
    """

    __tablename__ = "canaries"
    __table_args__ = (
        CheckConstraint(f"state IN {CANARY_STATES}", name="state"),
        Index(
            "uq_canaries_running",
            "route",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    route: Mapped[str] = mapped_column(ForeignKey("routes.name"))
    version: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    beside_version: Mapped[int] = mapped_column(ForeignKey("versions.id"))
    share: Mapped[float]
    state: Mapped[str]
    actor: Mapped[str]
    reason: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


class Audit(Base):
    """Every change that someone or something made."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str]
    action: Mapped[str]
    route: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)


def connect(url: str) -> Engine:
    """An engine on `url`. SQLite gets WAL, foreign keys, patience, and writers that queue instead of failing."""
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 3})
    engine = create_engine(url, connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: object) -> None:
        connection.isolation_level = (
            None  # The driver must not begin by itself: `_begin` below does.
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once when another writer came between, whatever the
        # timeout; one that takes the write lock at its start waits.
        immediate = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def transaction(engine: Engine, *, writes: bool) -> Iterator[Session]:
    """A session that commits at its end. Rows stay readable after it.

    Raises:
        Unavailable: the database can't be reached.
        InvalidRequest: a value that it can't hold (PostgreSQL refuses NUL in text).
    """
    try:
        with (
            Session(engine.execution_options(writes=writes), expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session
    except OperationalError as error:
        raise Unavailable(
            f"the database can't be reached: {error.orig}", code="database_unavailable"
        ) from error
    except DataError as error:
        raise InvalidRequest(f"the database can't keep this value: {error.orig}") from error
