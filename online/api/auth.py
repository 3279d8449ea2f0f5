"""API keys: random, kept as sha256, compared in constant time. Two kinds, and neither opens the other's door."""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.security.utils import get_authorization_scheme_param

from online.errors import InvalidRequest, Unauthorized


def new_key() -> tuple[str, str]:
    """A fresh key and its hash. 256 random bits need no slow hash."""
    key = f"sk-slip-{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def requires(entries: Sequence[str], kind: str) -> Callable[[Request], str]:
    """A FastAPI dependency that gives the name of the caller's key. Without entries everyone is "local"."""
    known = [entry.partition(":")[::2] for entry in entries]

    def authenticate(request: Request) -> str:
        if not known:
            _refuse_foreign_origin(request)
            return "local"
        scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized(
                f"this call needs {kind}: send it as `Authorization: Bearer KEY`",
                code="missing_api_key",
            )
        digest = hash_key(key)
        # Every entry is compared, so that the time taken does not tell which one matched.
        matches = [
            name for name, known_digest in known if hmac.compare_digest(digest, known_digest)
        ]
        if not matches:
            raise Unauthorized(f"this is not {kind} of this server")
        return matches[0]

    return authenticate


def _refuse_foreign_origin(request: Request) -> None:
    """Loopback without keys still must not serve a web page that the operator happens to visit."""
    origin = request.headers.get("origin")
    if origin and urlsplit(origin).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise InvalidRequest("cross-origin requests need an API key", param="origin")
