"""canaries"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATES = ("queued", "running", "promoted", "held", "rejected", "empty", "failed")


def upgrade() -> None:
    op.create_table(
        "canaries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("route", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("beside_version", sa.Integer(), nullable=False),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("actor", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('running', 'promoted', 'aborted', 'superseded')",
            name=op.f("ck_canaries_state"),
        ),
        sa.ForeignKeyConstraint(
            ["beside_version"], ["versions.id"], name=op.f("fk_canaries_beside_version_versions")
        ),
        sa.ForeignKeyConstraint(["route"], ["routes.name"], name=op.f("fk_canaries_route_routes")),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.id"], name=op.f("fk_canaries_version_versions")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_canaries")),
    )
    op.create_index(
        "uq_canaries_running",
        "canaries",
        ["route"],
        unique=True,
        sqlite_where=sa.text("state = 'running'"),
        postgresql_where=sa.text("state = 'running'"),
    )
    _allow((*STATES, "canary"))


def downgrade() -> None:
    op.execute("UPDATE cycles SET state = 'held' WHERE state = 'canary'")
    _allow(STATES)
    op.drop_index("uq_canaries_running", "canaries")
    op.drop_table("canaries")


def _allow(states: tuple[str, ...]) -> None:
    """Sets the states that a cycle may have. On SQLite this replaces the table (see `env.py`)."""
    with op.batch_alter_table("cycles") as cycles:
        cycles.drop_constraint(op.f("ck_cycles_state"), type_="check")
        cycles.create_check_constraint(op.f("ck_cycles_state"), f"state IN {states}")
