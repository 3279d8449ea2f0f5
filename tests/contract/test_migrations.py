"""Migrations and models say the same, on SQLite and PostgreSQL."""

import pytest
from alembic import command
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from migrations import config, upgrade
from online.database import connect
from online.tables import Base


def test_upgrading_makes_what_the_models_say(database_url: str) -> None:
    """`alembic upgrade head`, twice, and `alembic check` finds no difference."""
    upgrade(database_url)
    upgrade(database_url)
    command.check(config(database_url))


def test_downgrading_leaves_nothing(database_url: str) -> None:
    """Down to the base and up again."""
    upgrade(database_url)
    command.downgrade(config(database_url), "base")
    engine = connect(database_url)
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    upgrade(database_url)
    assert set(Base.metadata.tables) <= set(inspect(engine).get_table_names())
    engine.dispose()


def test_a_table_that_is_made_anew_keeps_its_rows_and_its_rules(database_url: str) -> None:
    """Cycles of before, with versions that refer to them; canaries turn into held candidates on the way down."""
    upgrade(database_url, "0001")
    engine = connect(database_url)
    columns = "route, state, actor, fence, attempts, heartbeat_at, report, error, created_at"
    values = "'default', '{}', 'test', 0, 0, '2026-01-01', '{{}}', '', '2026-01-01'"
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO routes VALUES ('default', false, '2026-01-01')"))
        connection.execute(
            text(f"INSERT INTO cycles ({columns}) VALUES ({values.format('promoted')})")
        )
        connection.execute(
            text(
                'INSERT INTO versions (route, cycle_id, sha256, recipe, "window", gate, git_commit, created_by, '
                "created_at) VALUES ('default', 1, 'a', '{}', '{}', '{}', '', 'test', '2026-01-01')"
            )
        )
    upgrade(database_url)
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO cycles ({columns}) VALUES ({values.format('canary')})")
        )
        connection.execute(
            text(f"INSERT INTO cycles ({columns}) VALUES ({values.format('queued')})")
        )
    for state in ("queued", "nonsense"):  # single flight, and the states that there are
        with pytest.raises(IntegrityError), engine.begin() as connection:
            connection.execute(
                text(f"INSERT INTO cycles ({columns}) VALUES ({values.format(state)})")
            )
    engine.dispose()
    command.downgrade(config(database_url), "0001")
    with engine.begin() as connection:
        found = connection.execute(text("SELECT state FROM cycles ORDER BY id")).scalars().all()
        assert found == ["promoted", "held", "queued"]
        assert connection.execute(text("SELECT cycle_id FROM versions")).scalars().all() == [1]
    engine.dispose()
