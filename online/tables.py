"""The registry's tables, the same on SQLite and PostgreSQL. Migrations live in `migrations/`.

Rows of `versions`, `activations` and `audit` are never updated or deleted. The active version of a
route is not a column: its newest activation names it.
"""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, MetaData, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from online.database import UtcDateTime, now

CYCLE_STATES = ("queued", "running", "promoted", "canary", "held", "rejected", "empty", "failed")
CANARY_STATES = ("running", "promoted", "aborted", "superseded")
ACTIVATION_KINDS = ("initial", "promotion", "manual", "rollback", "auto_rollback")
MAX_ID = 2**31 - 1  # largest value of an id column


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
    # What drafts must learn for the route's drafter, written by the decoder: fields of a recipe.
    teaching: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")


class Version(Base):
    """A draft version. Immutable."""

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
    """Which version became active, when, by whom and why.

    `number` counts per route and is unique, so that two writers can't both be next.
    """

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
    """One training cycle over one window. `fence` grows whenever a worker takes it over."""

    __tablename__ = "cycles"
    __table_args__ = (
        CheckConstraint(f"state IN {CYCLE_STATES}", name="state"),
        # A route has one unfinished cycle at most.
        Index(
            "uq_cycles_unfinished",
            "route",
            unique=True,
            sqlite_where=text("state IN ('queued', 'running')"),
            postgresql_where=text("state IN ('queued', 'running')"),
        ),
        # Two cycles never use the same signals.
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
    """A candidate that drafts for a share of its route's requests, beside the active version.

    `actor` and `reason` tell of its start while it runs, then of its end. The audit has both.
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
    """One change, by a person or by the service itself."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    actor: Mapped[str]
    action: Mapped[str]
    route: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    detail: Mapped[dict[str, Any]] = mapped_column(default=dict)
