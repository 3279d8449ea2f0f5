"""The benchmarks of one process at their smallest. No test asserts a time."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.bench import gpu, load, tap
from lab.streams import Stream
from online.messages import Delta, Query
from tests.tiny import TinyPair

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(
    pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Bench]:
    """Runs a benchmark's main on the tiny pair, and gives the JSON of its last line."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"def name_{i}(value): return"}) + "\n" for i in range(8))
    )
    threads = torch.get_num_threads()

    def run(main: Callable[[], None], *options: str) -> dict[str, Any]:
        given = f"--target {pair.target} --draft {pair.draft} --prompts {prompts}".split()
        fixed = ["--dtype", "float32", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["bench", *given, *fixed, *options])
        main()
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    yield run
    torch.set_num_threads(threads)  # a rig leaves this thread on one core


def test_tap_compares_recording_with_none(bench: Bench) -> None:
    """A ratio for each number of queries in flight; every recorded request is written."""
    words = "--repetitions 2 --concurrency 1 2 --rounds 2 --max-tokens 8 --gamma 2"
    figures = bench(tap.main, *words.split())
    assert set(figures["tap_ratio"]) == set(figures["tap_ratio_interval"]) == {"1", "2"}
    assert figures["tap_ratio_min"] == min(figures["tap_ratio"].values())
    assert figures["bytes_per_token"] > 0
    assert (figures["signals"], figures["signals_lost"]) == ((2 + 1) * (2 + 4), 0)


LOAD = ("--slots", "3", "--max-tokens", "12", "--max-context", "96", "--swap-every", "10")
DELAYS = ("ttft_ms_p99", "itl_ms_p99", "pause_ms_p50", "pause_ms_p99", "longest_pause_steps")


def test_a_steady_load_is_answered_and_leaks_nothing(bench: Bench) -> None:
    """Every request ends, none with an error, swaps change no greedy answer, slots stay usable."""
    figures = bench(load.main, "--requests", "60", *LOAD)
    assert figures["requests"] == 60 == figures["answered"] + figures["cancelled"]
    assert figures["cancelled"] > 0
    assert figures["swaps"] == 6
    assert figures["requests_across_swaps"] > 0
    assert figures["compared_answers"] > 0
    for none in ("errors", "unanswered", "draft_faults", "slots_leaked", "different_answers"):
        assert figures[none] == 0, none
    for some in (*DELAYS, "tokens", "memory_growth", "rss_mib"):
        assert figures[some] > 0, some


def test_a_poisson_load_sends_every_request(bench: Bench) -> None:
    """Arrivals do not wait for other requests to end; --swap-every 0 makes no swaps."""
    figures = bench(load.main, "--requests", "20", *LOAD[:-1], "0", "--rate", "200")
    assert figures["requests"] == 20 == figures["answered"] + figures["cancelled"]
    assert figures["swaps"] == figures["requests_across_swaps"] == 0
    assert figures["slots_leaked"] == 0


def test_a_delta_of_several_tokens_is_as_many_gaps() -> None:
    """The first delta gives the time to the first token instead."""
    stream = Stream(Query("q", "default", (1,), 8, 0.0), sent_s=1.0)
    stream.take(Delta("a", (5, 6)), now=1.5)
    stream.take(Delta("b", (7, 8)), now=2.5)
    assert stream.first_s == 0.5
    assert stream.gaps_s == [0.5, 0.5]


def test_the_benchmark_of_a_gpu_is_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs on any device, here with tiny random models."""
    monkeypatch.setattr(sys, "argv", ["bench", "--small"])
    threads = torch.get_num_threads()
    gpu.main()
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    times = ("plain_ms_per_token", "weights_read_ms", "speculative_step_ms", "swap_pause_ms")
    for key in (*times, "step_vs_forwards"):
        assert figures[key] > 0
