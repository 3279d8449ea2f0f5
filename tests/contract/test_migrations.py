"""Migrations and models say the same, on SQLite and PostgreSQL."""

from alembic import command
from sqlalchemy import inspect

from migrations import config, upgrade
from online.tables import Base, connect


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
