"""Traffic through the REST API: real prompts, a fixed number of clients, and what each answer said of itself."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from lab import corpus

HELD_OUT_FILES = 5  # of a package's files, one in so many gives held-out prompts and never traffic


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request."""

    tokens: int
    steps: int
    overlap: float | None  # mean Σ min(p, q); None where nothing was drafted
    versions: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Shape:
    """How requests are sent."""

    max_tokens: int = 64
    temperature: float = 1.0
    store: bool = True
    route: str | None = None
    clients: int = 8
    gamma: int | None = None  # None: the service's choice


def package_prompts(
    package: str, count: int, *, held_out: bool, seed: int, prompt_chars: int = 400
) -> list[str]:
    """`count` prompts cut at random out of a package's files; held-out prompts come from files of their own.

    Raises:
        ValueError: the package has no source files on that side.
    """
    files = [
        file
        for file in corpus.installed_files()
        if file.package == package
        and (corpus.bucket("query:" + file.key, HELD_OUT_FILES) == 0) == held_out
    ]
    if not files:
        raise ValueError(f"no source files of package {package!r} are installed")
    rng = random.Random(seed)
    texts = [file.text() for file in files]
    # Long files hold more code: they are cut more often.
    chosen = rng.choices(texts, weights=[len(text) for text in texts], k=count)
    return [corpus.cut_prompt(text, rng, prompt_chars) for text in chosen]


def shifted_package() -> str:
    """The largest installed package that neither embedded model was trained on."""
    sizes: dict[str, int] = {}
    for file in corpus.installed_files():
        if corpus.is_held_out_package(file.package):
            sizes[file.package] = sizes.get(file.package, 0) + file.path.stat().st_size
    return max(sizes, key=lambda package: sizes[package])


class Client:
    """The service as its users reach it."""

    def __init__(self, url: str, key: str = "", admin_key: str = "") -> None:
        self._http = httpx.Client(base_url=url, timeout=120, headers=_bearer(key))
        self._admin_headers = _bearer(admin_key or key)
        self.failures: list[str] = []

    def complete(self, prompt: str, shape: Shape, seed: int) -> Served:
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": shape.max_tokens,
            "temperature": shape.temperature,
            "seed": seed,
            "store": shape.store,
        }
        if shape.gamma is not None:
            body["speculation"] = {"gamma": shape.gamma}
        if shape.route:
            body["metadata"] = {"route": shape.route}
        answer = self._http.post("/v1/completions", json=body)
        answer.raise_for_status()
        return _served(answer.json())

    def admin(self, path: str) -> dict[str, Any]:
        answer = self._http.get(f"/admin/{path}", headers=self._admin_headers)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def change(self, path: str, reason: str) -> bool:
        """An admin call; False where somebody else's change came first."""
        answer = self._http.post(
            f"/admin/{path}", json={"reason": reason}, headers=self._admin_headers
        )
        if answer.status_code not in (404, 409):
            answer.raise_for_status()
        return answer.is_success

    def replay(
        self, prompts: Sequence[str], shapes: Sequence[Shape], seed: int, rate: float = math.inf
    ) -> Iterator[tuple[int, Served]]:
        """(index of the prompt, answer) as answers come; prompts take the shapes in turn.

        `rate` requests a second are sent at most. A failed request is kept in `failures`, and has no answer.
        """
        started = time.monotonic()

        def send(i: int, prompt: str) -> Served:
            time.sleep(max(0.0, started + i / rate - time.monotonic()))
            return self.complete(prompt, shapes[i % len(shapes)], seed + i)

        with ThreadPoolExecutor(shapes[0].clients) as pool:
            sent = {pool.submit(send, i, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in as_completed(sent):
                    try:
                        served = future.result()
                    except httpx.HTTPError as error:
                        self.failures.append(f"{type(error).__name__}: {error}")
                    else:
                        yield sent[future], served
            finally:
                pool.shutdown(cancel_futures=True)


def answers(
    client: Client,
    prompts: Sequence[str],
    shape: Shape,
    seed: int,
    each: Callable[[], None] = lambda: None,
) -> dict[int, Served]:
    """Every answer by its prompt's index, so that two replays pair up."""
    found = {}
    for index, served in client.replay(prompts, [shape], seed):
        found[index] = served
        each()
    return found


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
