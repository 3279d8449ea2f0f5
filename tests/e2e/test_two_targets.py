"""Two targets with a decoder each, on one route: one draft serves and learns from both."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lab.stored import stored
from lab.warmup.models import model_from_target
from online.processes import ROOT, end_group, environment, worker_command
from online.settings import Settings
from online.signals import decode
from tests.e2e.conftest import Served, serve, tiny_settings
from tests.loop.conftest import until
from tests.tiny import TinyPair

PROMPTS = [f"def f{i}(" for i in range(64)]
FIXED = PROMPTS[:6]


@contextmanager
def worker(settings: Settings) -> Iterator[None]:
    process = subprocess.Popen(
        worker_command(), cwd=ROOT, env=environment(settings), start_new_session=True
    )
    try:
        yield
    finally:
        end_group(process)


@pytest.fixture
def both(pair: TinyPair, redis_url: str, tmp_path: Path) -> Iterator[list[Served]]:
    """The second target has one of the first one's two layers. The draft knows neither."""
    smaller = tmp_path / "smaller"
    model_from_target(str(pair.target), 1, smaller, AutoTokenizer.from_pretrained(pair.target))
    shared = tiny_settings(
        pair,
        tmp_path,
        redis_url,
        draft=str(pair.spoilt),
        routes="default",
        closed_routes="",
        canary_share=0,
        search_recipe=False,
        recipe={"learning_rate": 3e-3, "epochs": 4},
        trainer_threads=2,
    )
    with serve(shared) as one, serve(shared.model_copy(update={"target": str(smaller)})) as other:
        yield [one, other]


def texts(served: Served, gamma: int) -> list[str]:
    return [
        served.complete(p, speculation={"gamma": gamma}, store=False)["choices"][0]["text"]
        for p in FIXED
    ]


def test_one_draft_serves_two_targets_and_learns_from_both(both: list[Served]) -> None:
    """One cycle learns from both; both decoders run its draft; answers stay each target's."""
    before = [texts(served, 0) for served in both]
    assert before[0] != before[1]
    assert {served.route()["loaded_version"] for served in both} == {1}, "one first draft for both"
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda i: both[i % 2].complete(PROMPTS[i // 2], temperature=i // 2 % 2),
                range(2 * len(PROMPTS)),
            )
        )
    buffer = both[0].buffer
    until(lambda: buffer.depth("default").signals >= 2 * len(PROMPTS))
    signals = [decode(entry.record) for entry in stored(buffer, "default")]
    targets = {served.http.get("/admin/routes").json()["target_fingerprint"] for served in both}
    assert {signal.model for signal in signals} == targets
    assert len(targets) == 2

    with worker(both[0].settings):
        both[0].post("/admin/routes/default/cycles", reason="enough")
        cycle = until(
            lambda: (
                c
                if (c := both[0].http.get("/admin/cycles").json()["cycles"][0])["finished_at"]
                else None
            )
        )
    assert cycle["state"] == "promoted", cycle
    made = both[0].registry.active("default")
    assert made is not None
    assert made.parent_id == 1
    assert (
        made.window["signals"] == made.window["trained_on"] + made.gate["requests"] == len(signals)
    )
    for served, plain in zip(both, before, strict=True):
        served.running(made.id)
        assert texts(served, 4) == texts(served, 0) == plain
        assert served.http.get("/health").status_code == 200
