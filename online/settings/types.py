"""Types of settings: comma-separated names of routes and entries of API keys."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_settings import NoDecode

_NAME = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


def is_route_name(name: str) -> bool:
    return _NAME.match(name) is not None


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _route_names(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not is_route_name(name):
            raise ValueError(
                f"route {name!r}: use lower-case letters, digits, '-' and '_', at most 63 of them"
            )
    return names


def _key_entries(entries: tuple[str, ...]) -> tuple[str, ...]:
    for entry in entries:
        name, _, digest = entry.partition(":")
        if not name or not _SHA256.match(digest):
            # The message does not repeat the entry: it may be a key that was pasted unhashed.
            raise ValueError("each entry is name:sha256, as `slipstream key NAME` prints it")
    return entries


# NoDecode: a variable is a comma-separated list, not JSON.
Routes = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_route_names)]
Keys = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_key_entries)]
