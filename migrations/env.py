"""Alembic's entry point: the URL comes from the caller's configuration, else from SLIPSTREAM_* settings."""

from alembic import context

from online.settings import Settings
from online.tables import Base, connect

url = context.config.get_main_option("sqlalchemy.url") or Settings().sql_url
options = {"target_metadata": Base.metadata, "render_as_batch": True, "compare_type": True}

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with connect(url).connect() as connection:
        if connection.dialect.name == "sqlite":
            # A change to a constraint makes its table anew, and dropping the old one would count as deleting rows that
            # others refer to. Only outside of a transaction is SQLite told so, and SQLAlchemy begins one by itself.
            connection.connection.execute("PRAGMA foreign_keys=OFF")
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
