"""Activations inside a transaction: which version is active, and the append-only history of that.

The newest activation of a route names its active version. A rollback is another activation.
"""

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from online.audit import record
from online.errors import Conflict, NotFound
from online.tables import Activation, Route, Version
from online.versions import is_generic, require_version


class raced:
    """Turns a violation of the unique key (route, number) into a Conflict."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, IntegrityError):
            raise Conflict("another activation came first; look at the route again") from error


def require_route(session: Session, name: str, *, change: bool = False) -> Route:
    """The route with this name.

    `change` locks it until the transaction ends, so that changes of its draft come one by one.

    Raises:
        NotFound: there is none.
    """
    route = session.get(Route, name, with_for_update={"key_share": True} if change else None)
    if route is None:
        raise NotFound(f"no route named {name!r}", param="route", code="route_not_found")
    return route


def newest_activation(session: Session, route: str) -> Activation | None:
    query = (
        select(Activation)
        .where(Activation.route == route)
        .order_by(Activation.number.desc())
        .limit(1)
    )
    return session.scalars(query).one_or_none()


def activation_history(session: Session, route: str) -> list[Activation]:
    """Every activation of the route, oldest first."""
    query = select(Activation).where(Activation.route == route).order_by(Activation.number)
    return list(session.scalars(query))


def active_version(session: Session, route: str) -> Version | None:
    newest = newest_activation(session, route)
    return require_version(session, newest.to_version) if newest else None


def serving_version(session: Session, route: str) -> Version | None:
    """The version that drafts for the route.

    That is its active version. A generic version is replaced by the one that it stands for.
    """
    version = active_version(session, route)
    if version is None or version.parent_id is None or not is_generic(version):
        return version
    return active_version(session, require_version(session, version.parent_id).route)


def add_activation(
    session: Session,
    route: str,
    after: Activation | None,
    to: int,
    kind: str,
    actor: str,
    reason: str,
) -> Activation:
    """Activates version `to`. `after`: the newest activation when the caller decided.

    If another activation came in between, the unique key on (route, number) refuses this one:
    no decision is applied to a state that it was not made for.

    Raises:
        Conflict: the version is active already.
    """
    active = after.to_version if after else None
    if active == to:
        raise Conflict(f"version {to} is active already", param="version", code="already_active")
    activation = Activation(
        route=route,
        number=after.number + 1 if after else 1,
        from_version=active,
        to_version=to,
        kind=kind,
        actor=actor,
        reason=reason,
    )
    session.add(activation)
    session.flush()
    record(session, actor, f"activate:{kind}", route, reason, from_version=active, to_version=to)
    return activation


def rollback_target(history: Iterable[tuple[str, int]]) -> int | None:
    """The version to go back to. `history`: kind and version of each activation, oldest first.

    Activations push on a stack and rollbacks pop it; the target lies below the top.
    """
    stack: list[int] = []
    for kind, to in history:
        if kind in ("rollback", "auto_rollback") and to in stack:
            while stack[-1] != to:
                stack.pop()
        else:
            stack.append(to)
    return stack[-2] if len(stack) > 1 else None
