"""Draft versions inside a transaction: what a version is made of, reading one, adding one."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from online.errors import NotFound
from online.tables import MAX_ID, Version

# Origin of a version that stands for another route's active draft. Its parent belongs to that
# route. While such a version is active, its route has no draft of its own.
GENERIC = "generic draft"


@dataclass(frozen=True, slots=True)
class Candidate:
    """The content of a version that has no number yet."""

    sha256: str
    recipe: dict[str, Any]
    window: dict[str, Any]
    gate: dict[str, Any]
    git_commit: str


def is_generic(version: Version) -> bool:
    return version.recipe.get("origin") == GENERIC


def require_version(session: Session, version_id: int) -> Version:
    """The version with this id.

    Raises:
        NotFound: there is none. Ids beyond the column's range do not exist either.
    """
    version = session.get(Version, version_id) if 0 < version_id <= MAX_ID else None
    if version is None:
        raise NotFound(f"no version {version_id}", param="version", code="version_not_found")
    return version


def add_version(
    session: Session,
    route: str,
    candidate: Candidate,
    actor: str,
    *,
    parent_id: int | None,
    cycle_id: int | None,
) -> Version:
    """Registers a candidate as a version of the route. It is not active yet."""
    version = Version(
        route=route,
        parent_id=parent_id,
        cycle_id=cycle_id,
        sha256=candidate.sha256,
        recipe=candidate.recipe,
        window=candidate.window,
        gate=candidate.gate,
        git_commit=candidate.git_commit,
        created_by=actor,
    )
    session.add(version)
    session.flush()
    return version
