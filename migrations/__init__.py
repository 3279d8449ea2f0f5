"""Database migrations. `slipstream migrate` and `upgrade(url)` apply them."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def config(url: str) -> Config:
    """Alembic's configuration for a database."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database to the newest schema or to a given revision. Safe to repeat."""
    command.upgrade(config(url), revision)
