"""The audit: every change, with its author and reason."""

from typing import Any

from sqlalchemy.orm import Session

from online.tables import Audit


def record(
    session: Session, actor: str, action: str, route: str, reason: str = "", **detail: Any
) -> None:
    """Adds an audit row to the transaction that makes the change."""
    session.add(Audit(actor=actor, action=action, route=route, reason=reason, detail=detail))
