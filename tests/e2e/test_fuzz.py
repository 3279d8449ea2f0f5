"""Schemathesis on the service's OpenAPI description: no 5xx, and the engine keeps running."""

import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.e2e.conftest import Served


def test_no_generated_request_breaks_the_service(shared: Served) -> None:
    """Every operation with valid and invalid bodies: errors have OpenAI's format."""
    schema = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 18
    for operation in operations:
        _fuzz(operation, shared)
    assert shared.http.get("/health").status_code == 200
    assert shared.complete()["usage"]["completion_tokens"] > 0


def _fuzz(operation: schemathesis.APIOperation, served: Served) -> None:
    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(
        case=operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)
    )
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 8)
        answer = case.call(base_url=served.url)
        assert answer.status_code < 500, f"{operation.label}: {answer.status_code} {answer.text}"
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"], operation.label

    run()
