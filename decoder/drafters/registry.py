"""Finds the drafters: the `DRAFTERS` of all modules in this package."""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType

import decoder.drafters as package
from decoder.drafters.base import Drafter
from online.drafters import AUTO, DEFAULT, DrafterDescription, Teaching
from online.errors import InvalidRequest
from online.messages import MAX_GAMMA
from online.settings import Settings


@cache
def drafters() -> Mapping[str, Drafter]:
    """All drafters by name, the default one first."""
    names = [module.name for module in iter_modules(package.__path__)]
    modules = [import_module(f"{package.__name__}.{name}") for name in names]
    found = by_name(drafter for module in modules for drafter in getattr(module, "DRAFTERS", ()))
    return MappingProxyType({DEFAULT: found.pop(DEFAULT), **found})


def by_name(found: Iterable[Drafter]) -> dict[str, Drafter]:
    """Raises ValueError: two drafters have the same name, or one is named "auto"."""
    named: dict[str, Drafter] = {}
    for drafter in found:
        if drafter.name == AUTO or drafter.name in named:
            raise ValueError(f"the drafter name {drafter.name!r} is taken")
        named[drafter.name] = drafter
    return named


def descriptions() -> Mapping[str, DrafterDescription]:
    """What requests and settings may name, as the API and the trainer know it."""
    nameable = [drafter for drafter in drafters().values() if drafter.nameable]
    found = [DrafterDescription(d.name, d.max_candidates, d.teaching) for d in nameable]
    found.append(DrafterDescription(AUTO, MAX_GAMMA, _teaching_for_auto))
    return {description.name: description for description in found}


def check_settings(settings: Settings) -> None:
    """Raises ValueError: a route's default drafting is not possible."""
    for route, options in settings.drafters.items():
        try:
            options.check(descriptions())
        except InvalidRequest as error:
            raise ValueError(f"drafters: {route}: {error.message}") from error


def teaching_by_route(settings: Settings) -> dict[str, Teaching]:
    """What drafts must learn for the default drafters of their routes."""
    known = descriptions()
    needed = {}
    for route in settings.served_routes:
        options = settings.drafting(route)
        gamma = settings.gamma if options.gamma is None else options.gamma
        needed[route] = known[options.drafter or DEFAULT].teaching(gamma)
    return needed


def _teaching_for_auto(gamma: int) -> Teaching:
    """Enough for every drafter that "auto" may choose."""
    needed: dict[str, int] = {}
    for drafter in drafters().values():
        if drafter.in_auto:
            for field, value in drafter.teaching(gamma).items():
                needed[field] = max(value, needed.get(field, 0))
    return needed
