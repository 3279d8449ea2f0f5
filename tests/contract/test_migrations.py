"""Migrations and models agree, on SQLite and PostgreSQL."""

import pytest
from alembic import command
from sqlalchemy import TextClause, inspect, text
from sqlalchemy.exc import IntegrityError

from migrations import config, upgrade
from online.database import connect
from online.tables import Base

VERSION_OF_CYCLE_1 = text(
    'INSERT INTO versions (route, cycle_id, sha256, recipe, "window", gate, git_commit, '
    "created_by, created_at) "
    "VALUES ('default', 1, 'a', '{}', '{}', '{}', '', 'test', '2026-01-01')"
)


def cycle_in(state: str) -> TextClause:
    """Inserts a cycle in the schema of the first migration."""
    return text(
        "INSERT INTO cycles "
        "(route, state, actor, fence, attempts, heartbeat_at, report, error, created_at) VALUES "
        f"('default', '{state}', 'test', 0, 0, '2026-01-01', '{{}}', '', '2026-01-01')"
    )


def test_upgrading_makes_the_models_tables(database_url: str) -> None:
    """`alembic upgrade head` twice, then `alembic check` finds no difference."""
    upgrade(database_url)
    upgrade(database_url)
    command.check(config(database_url))


def test_downgrading_leaves_nothing(database_url: str) -> None:
    """To the base and up again."""
    upgrade(database_url)
    command.downgrade(config(database_url), "base")
    engine = connect(database_url)
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    upgrade(database_url)
    assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())
    engine.dispose()


def test_a_replaced_table_keeps_its_rows_and_constraints(database_url: str) -> None:
    """Versions still refer to their cycles. Downgrading turns canaries into held candidates."""
    upgrade(database_url, "0001")
    engine = connect(database_url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO routes VALUES ('default', false, '2026-01-01')"))
        connection.execute(cycle_in("promoted"))
        connection.execute(VERSION_OF_CYCLE_1)
    upgrade(database_url)
    with engine.begin() as connection:
        connection.execute(cycle_in("canary"))
        connection.execute(cycle_in("queued"))
    # A second unfinished cycle, and a state that does not exist.
    for state in ("queued", "nonsense"):
        with pytest.raises(IntegrityError), engine.begin() as connection:
            connection.execute(cycle_in(state))
    engine.dispose()
    command.downgrade(config(database_url), "0001")
    with engine.begin() as connection:
        found = connection.execute(text("SELECT state FROM cycles ORDER BY id")).scalars().all()
        assert found == ["promoted", "held", "queued"]
        assert connection.execute(text("SELECT cycle_id FROM versions")).scalars().all() == [1]
    engine.dispose()
