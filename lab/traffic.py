"""Traffic through the REST API from a fixed number of clients, and what each answer reports."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request."""

    tokens: int
    steps: int
    overlap: float | None  # mean Σ min(p, q); None where nothing was drafted
    versions: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class RequestOptions:
    max_tokens: int = 64
    temperature: float = 1.0
    store: bool = True
    gamma: int | None = None  # None: the service's choice


class Client:
    """The service as its users reach it; failed requests end in `failures`."""

    def __init__(self, url: str, key: str = "", admin_key: str = "", workers: int = 8) -> None:
        self._http = httpx.Client(base_url=url, timeout=120, headers=_bearer(key))
        self._admin_headers = _bearer(admin_key or key)
        self._workers = workers
        self.requests = 0
        self.failures: list[str] = []

    def complete(self, prompt: str, options: RequestOptions, seed: int) -> Served:
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": seed,
            "store": options.store,
        }
        if options.gamma is not None:
            body["speculation"] = {"gamma": options.gamma}
        answer = self._http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return _served(answer.json())

    def admin(self, path: str) -> dict[str, Any]:
        answer = self._http.get(f"/admin/{path}", headers=self._admin_headers)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def change(self, path: str, reason: str) -> bool:
        """An admin call; False where another change came first."""
        body, headers = {"reason": reason}, self._admin_headers
        answer = self._http.post(f"/admin/{path}", json=body, headers=headers)
        if answer.status_code not in (404, 409):
            answer.raise_for_status()
        return answer.is_success

    def send(
        self,
        prompts: Sequence[str],
        options: Sequence[RequestOptions],
        seed: int,
        rate: float = math.inf,
    ) -> Iterator[tuple[int, Served]]:
        """(index of the prompt, answer) as answers come; prompts take the options in turn.

        At most `rate` requests a second are sent.
        """
        started = time.monotonic()

        def send(i: int, prompt: str) -> Served:
            time.sleep(max(0.0, started + i / rate - time.monotonic()))
            return self.complete(prompt, options[i % len(options)], seed + i)

        with ThreadPoolExecutor(self._workers) as pool:
            sent = {pool.submit(send, i, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(sent):
                    self.requests += 1
                    try:
                        yield sent[future], future.result()
                    except httpx.HTTPError as error:
                        self.failures.append(f"{type(error).__name__}: {error}")
            finally:
                pool.shutdown(cancel_futures=True)


def _served(answer: dict[str, Any]) -> Served:
    speculation = answer["metrics"]["speculative_decoding"]
    return Served(
        tokens=answer["usage"]["completion_tokens"],
        steps=speculation["num_spec_steps"],
        overlap=speculation["acceptance_rate"],
        versions=tuple(part["version"] for part in speculation["draft_versions"]),
        text=answer["choices"][0]["text"],
    )


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
