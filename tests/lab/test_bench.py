"""The benchmarks of one process at their smallest: they end, and say what they promise. No test asserts a time."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.bench import gpu, soak, swap, tap
from lab.bench.load import Swap
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
        given = [
            "--target",
            str(pair.target),
            "--draft",
            str(pair.draft),
            "--prompts",
            str(prompts),
        ]
        monkeypatch.setattr(
            sys, "argv", ["bench", *given, "--dtype", "float32", "--threads", "1", *options]
        )
        main()
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    yield run
    torch.set_num_threads(threads)  # a rig leaves this thread on one core


def test_tap_compares_recording_with_none(bench: Bench) -> None:
    """A ratio for each number of queries in flight, and a record for every request of the recorded side."""
    figures = bench(
        tap.main,
        "--repetitions",
        "2",
        "--concurrency",
        "1,2",
        "--rounds",
        "2",
        "--max-tokens",
        "8",
        "--gamma",
        "2",
    )
    assert set(figures["tap_ratio"]) == set(figures["tap_ratio_interval"]) == {"1", "2"}
    assert figures["tap_ratio_min"] == min(figures["tap_ratio"].values())
    assert figures["bytes_per_token"] > 0
    assert (figures["signals"], figures["signals_lost"]) == ((2 + 1) * (2 + 4), 0)


def test_swaps_drop_nobody_and_change_no_greedy_answer(bench: Bench) -> None:
    """All the swaps happen, under requests that see more than one draft."""
    figures = bench(
        swap.main, "--swaps", "6", "--streams", "3", "--max-tokens", "24", "--steps-between", "2"
    )
    assert figures["swaps"] == 6
    assert figures["dropped"] == figures["different_answers"] == 0
    assert figures["compared_answers"] > 0
    assert figures["requests_across_swaps"] > 0
    for key in (
        "pause_ms_p50",
        "pause_ms_p99",
        "median_step_ms",
        "longest_pause_steps",
        "longest_gap_steps",
    ):
        assert figures[key] > 0


def test_soak_answers_everyone_and_leaks_no_slot(bench: Bench) -> None:
    """Every request ends one way, none with an error; prompts reach the context's limit."""
    figures = bench(
        soak.main,
        "--requests",
        "120",
        "--slots",
        "4",
        "--max-tokens",
        "12",
        "--max-context",
        "96",
        "--swap-every",
        "30",
    )
    assert figures["requests"] == 120 == figures["answered"] + figures["cancelled"]
    assert figures["cancelled"] > 0
    assert (
        figures["errors"]
        == figures["unanswered"]
        == figures["draft_faults"]
        == figures["slots_leaked"]
        == 0
    )
    assert figures["swaps"] == 4
    assert figures["memory_growth"] > 0
    assert figures["rss_mib"] > 0
    assert figures["tokens"] > 0


def test_a_gap_with_a_swap_ends_with_the_step_after_it() -> None:
    """A swap after the last step is in no gap."""
    ends = np.array([1.0, 2.0, 5.0, 6.0])
    around, others = swap.gaps(ends, [Swap(0.0, 2.5, 3.0), Swap(6.0, 6.5, 7.0)])
    assert (around, others) == ([3.0], [1.0, 1.0])


def test_the_benchmark_of_a_gpu_is_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On whatever there is, with models that are as good as none."""
    monkeypatch.setattr(sys, "argv", ["bench", "--small"])
    threads = torch.get_num_threads()
    gpu.main()
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for key in (
        "plain_ms_per_token",
        "weights_read_ms",
        "speculative_step_ms",
        "step_vs_forwards",
        "swap_pause_ms",
    ):
        assert figures[key] > 0
