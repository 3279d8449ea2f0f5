"""API keys: random, stored as sha256, compared in constant time.

There are two kinds. Generation keys open the generation endpoints, admin keys the admin endpoints.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from online.api.parts import Parts
from online.errors import InvalidRequest, Unauthorized

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# auto_error: keys are optional, and our own errors have OpenAI's shape.
_generation_scheme = HTTPBearer(
    scheme_name="GenerationKey",
    description="Needed if the server has keys. `slipstream key NAME` makes one.",
    auto_error=False,
)
_admin_scheme = HTTPBearer(
    scheme_name="AdminKey",
    description="Needed if the server has keys. `slipstream key NAME` makes one.",
    auto_error=False,
)
Credentials = HTTPAuthorizationCredentials | None


def new_key() -> tuple[str, str]:
    """A fresh key and its hash. 256 random bits need no slow hash."""
    key = f"sk-slip-{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


async def generation_caller(
    request: Request,
    parts: Parts,
    credentials: Annotated[Credentials, Depends(_generation_scheme)],
) -> str:
    """Name of the generation key; "local" if the server has no keys."""
    entries = parts.settings.generation_keys
    return _authenticate(request, credentials, entries, "a generation key")


async def admin_caller(
    request: Request,
    parts: Parts,
    credentials: Annotated[Credentials, Depends(_admin_scheme)],
) -> str:
    """Name of the admin key; "local" if the server has no keys."""
    return _authenticate(request, credentials, parts.settings.admin_keys, "an admin key")


Caller = Annotated[str, Depends(generation_caller)]
Actor = Annotated[str, Depends(admin_caller)]


def _authenticate(
    request: Request, credentials: Credentials, entries: Sequence[str], kind: str
) -> str:
    if not entries:
        _refuse_foreign_origin(request)
        return "local"
    if credentials is None:
        raise Unauthorized(
            f"this call needs {kind}: send it as `Authorization: Bearer KEY`",
            code="missing_api_key",
        )
    digest = hash_key(credentials.credentials)
    # Every entry is compared, so that the time taken does not reveal which one matched.
    pairs = [entry.partition(":")[::2] for entry in entries]
    matches = [name for name, known in pairs if hmac.compare_digest(digest, known)]
    if not matches:
        raise Unauthorized(f"this is not {kind} of this server")
    return matches[0]


def _refuse_foreign_origin(request: Request) -> None:
    """Without keys, a web page that the operator visits must not reach the API on loopback."""
    origin = request.headers.get("origin")
    if origin and urlsplit(origin).hostname not in LOOPBACK:
        raise InvalidRequest("cross-origin requests need an API key", param="origin")
