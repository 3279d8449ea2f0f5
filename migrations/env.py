"""Alembic's entry point. The URL is the configuration's, or else that of the settings."""

from alembic import context

from online.database import connect
from online.settings import Settings
from online.tables import Base

url = context.config.get_main_option("sqlalchemy.url") or Settings().sql_url
options = {"target_metadata": Base.metadata, "render_as_batch": True, "compare_type": True}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with connect(url).connect() as connection:
        if connection.dialect.name == "sqlite":
            # SQLite changes a constraint by replacing the whole table, and other rows refer to
            # its rows. The pragma has an effect only outside of a transaction, and SQLAlchemy
            # begins one by itself.
            connection.connection.execute("PRAGMA foreign_keys=OFF")
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
