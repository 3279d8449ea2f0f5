"""API keys: which key opens which endpoints, and how pages like /docs find out."""

from pathlib import Path
from typing import Any

import httpx

from lab.stored import stored
from online.api.auth import new_key
from online.signals import decode, pseudonym
from tests.e2e.conftest import Served, serve, tiny_settings
from tests.loop.conftest import until
from tests.tiny import TinyPair


def test_each_kind_of_key_opens_its_own_endpoints(
    pair: TinyPair, redis_url: str, tmp_path: Path
) -> None:
    """Health and metrics need no key."""
    (user, user_hash), (operator, operator_hash) = new_key(), new_key()
    settings = tiny_settings(
        pair,
        tmp_path,
        redis_url,
        generation_keys=f"app:{user_hash}",
        admin_keys=f"alice:{operator_hash}",
    )
    assert settings.bind_host == "0.0.0.0"
    with serve(settings) as served:

        def status(path: str, key: str | None, method: str = "GET") -> int:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            body = {"prompt": "x", "max_tokens": 1} if method == "POST" else None
            return httpx.request(method, served.url + path, json=body, headers=headers).status_code

        assert [
            status("/v1/completions", key, "POST") for key in (user, operator, "wrong", None)
        ] == [
            200,
            401,
            401,
            401,
        ]
        assert [status("/admin/routes", key) for key in (operator, user, "wrong", None)] == [
            200,
            401,
            401,
            401,
        ]
        ends = "/admin/routes/default/canary/promote"
        assert [status(ends, key, "POST") for key in (user, None)] == [401, 401]
        assert [status(path, None) for path in ("/health", "/ready", "/metrics", "/version")] == [
            200
        ] * 4
        served.http.headers["authorization"] = f"Bearer {operator}"
        served.post("/admin/routes/default/freeze", reason="x")
        assert served.registry.audit()[0].actor == "alice"
        (entry,) = until(lambda: stored(served.buffer, "default"))
        assert decode(entry.record).client == pseudonym("app")


def test_without_keys_the_server_refuses_foreign_pages(
    shared: Served,
) -> None:
    """It stays on loopback. A web page that the operator visits must not reach it."""
    assert shared.settings.bind_host == "127.0.0.1"
    refused = shared.http.post(
        "/admin/routes/default/freeze",
        json={"reason": "x"},
        headers={"origin": "https://evil.example"},
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "origin")


def test_the_docs_can_authorise(shared: Served) -> None:
    """The OpenAPI description names the kind of key that each endpoint needs."""
    described: dict[str, Any] = shared.http.get("/openapi.json").json()
    schemes = described["components"]["securitySchemes"]
    assert {name: scheme["scheme"] for name, scheme in schemes.items()} == {
        "GenerationKey": "bearer",
        "AdminKey": "bearer",
    }
    for path, methods in described["paths"].items():
        expected = _expected_scheme(path)
        for operation in methods.values():
            assert operation.get("security") == expected, path


def _expected_scheme(path: str) -> list[dict[str, list[str]]] | None:
    if path.startswith("/v1/"):
        return [{"GenerationKey": []}]
    return [{"AdminKey": []}] if path.startswith("/admin/") else None
