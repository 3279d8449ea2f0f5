"""What follows for a candidate that passed the gate, inside the transaction that ends its cycle."""

from sqlalchemy.orm import Session

from online.activations import add_activation, newest_activation, serving_version
from online.canaries import open_canary, running_canary
from online.tables import Cycle, Route, Version


def roll_out(
    session: Session,
    cycle: Cycle,
    route: Route,
    version: Version,
    parent: Version,
    canary_share: float,
) -> None:
    """Promotes the version, starts its canary, or holds it with a reason."""
    name, by = route.name, "trainer"
    if obstacle := _obstacle(session, route, parent):
        cycle.state, cycle.error = "held", obstacle
        return
    reason = version.gate["reason"]
    if canary_share:
        cycle.state = "canary"
        open_canary(session, name, version.id, parent.id, canary_share, by, reason)
    else:
        cycle.state = "promoted"
        newest = newest_activation(session, name)
        add_activation(session, name, newest, version.id, "promotion", by, reason)


def _obstacle(session: Session, route: Route, parent: Version) -> str:
    """Why a candidate compared with `parent` can't be rolled out now; empty if it can."""
    if route.frozen:
        return "the route is frozen"
    serving = serving_version(session, route.name)
    if serving is None or serving.id != parent.id:
        return f"the active version is no longer {parent.id}"
    if (canary := running_canary(session, route.name)) is not None:
        return f"version {canary.version} is a canary on this route"
    return ""
