"""Database migrations. `slipstream migrate` applies them; `upgrade(url)` is the same call for tests and tools."""

from pathlib import Path

from alembic import command
from alembic.config import Config


def config(url: str) -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return made


def upgrade(url: str, revision: str = "head") -> None:
    """Brings the database to the newest schema, or to an older one on the way there. Safe to repeat."""
    command.upgrade(config(url), revision)
