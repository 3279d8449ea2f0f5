"""The lab's statistics, charts and options, and the split of its corpus."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from lab import corpus
from lab.charts import LearningCurve, draw, moving_ratio
from lab.corpus import held_out_packages, package_prompts
from lab.options import option, parse
from lab.reference_pair import chosen_files
from lab.statistics import median_ratio, paired_ratio
from lab.traffic import Served


def test_traffic_comes_from_packages_that_no_model_was_trained_on() -> None:
    """Held out by hash: the training side has no file of them, and no held-out file of others."""
    package = held_out_packages()[0]
    assert corpus.is_held_out_package(package)
    trained = {file.package for file in chosen_files(held_out=False)}
    assert package not in trained
    assert corpus.STDLIB in trained
    only = {file.package for file in chosen_files(held_out=False, stdlib_only=True)}
    assert only == {corpus.STDLIB}


def test_held_out_prompts_are_of_other_files_than_traffic() -> None:
    """And both are the same on every run."""
    package = held_out_packages()[0]
    traffic = package_prompts(package, 30, held_out=False, seed=1)
    held_out = package_prompts(package, 30, held_out=True, seed=1)
    assert traffic == package_prompts(package, 30, held_out=False, seed=1)
    assert not set(traffic) & set(held_out)
    with pytest.raises(ValueError, match="no source files"):
        package_prompts("no_such_package", 1, held_out=True, seed=1)


def test_prompts_are_cut_from_their_text() -> None:
    """They start at a line, and short texts give their first half."""
    text = "".join(f"line {i}\n" for i in range(200))
    for seed in range(20):
        prompt = corpus.cut_prompt(text, random.Random(seed), 100)
        assert prompt in text
        assert prompt.startswith("line")
        assert len(prompt) <= 100
    assert corpus.cut_prompt("short", random.Random(0), 100) == "sh"


def test_a_paired_ratio_is_of_totals_with_its_interval() -> None:
    """Twice the tokens per step is a ratio of 2, with no width when every pair agrees."""
    tokens = np.array([10.0, 20.0, 30.0])
    same = paired_ratio((tokens, tokens), (tokens, tokens / 2))
    assert (same.value, same.low, same.high) == pytest.approx((2, 2, 2))
    noisy = paired_ratio((tokens, tokens), (tokens, np.array([10.0, 10.0, 30.0])))
    assert noisy.value == pytest.approx(60 / 50)
    assert noisy.low < noisy.value < noisy.high


def test_a_median_ratio_of_one_repetition_has_no_interval() -> None:
    """Of several it lies between the smallest and the largest."""
    assert median_ratio([1.5]).figures == [1.5, 1.5, 1.5]
    several = median_ratio([1.0, 1.1, 1.2, 1.3])
    assert several.value == pytest.approx(1.15)
    assert 1.0 <= several.low < several.value < several.high <= 1.3


def test_a_moving_ratio_is_of_what_is_inside_the_window() -> None:
    """Totals over the last pairs, not a mean of ratios."""
    ends, values = moving_ratio([(1, 1), (3, 1), (8, 4)], window=2)
    assert ends.tolist() == [1, 2, 3]
    assert values.tolist() == pytest.approx([1, 2, 11 / 5])


def test_a_stretch_that_compared_nothing_leaves_a_gap(tmp_path: Path) -> None:
    """It has no acceptance rate: that is not 0."""
    _, values = moving_ratio([(0.5, 1), (0, 0), (0, 0)], window=1)
    assert values[0] == 0.5
    assert np.isnan(values[1:]).all()
    served = [Served(10, 10, None, (1,), "") for _ in range(3)]
    assert draw(LearningCurve(served, 1.5, 2.0, 0.4, 0.5), tmp_path / "chart.png").is_file()


def test_swaps_are_marked_where_a_version_drafts_alone(tmp_path: Path) -> None:
    """The first version is no swap, nor is a canary that others outlive."""
    served = [Served(10, 5, 0.5, (v,), "") for v in (0, 1, 1, 2, 1, 2, 1, 3, 1, 3, 3)]
    curve = LearningCurve(served, 1.5, 2.0, 0.4, 0.5)
    assert curve.trials == [(2, 3, 9), (3, 7, 9)]
    assert curve.swaps == [(9, 3)]
    assert draw(curve, tmp_path / "a" / "chart.png").read_bytes().startswith(b"\x89PNG")


@dataclass(frozen=True)
class Given:
    count: int = option(3, "things")
    levels: tuple[int, ...] = option((1, 8), "of it")
    kind: Literal["a", "b"] | None = option(None, "of things")
    fast: bool = option(False, "sooner")

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("--count: at least 0")


def test_options_are_fields_with_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not given keeps its default; a list replaces its default."""
    words = ["lab", "--levels", "2", "--levels", "4", "5", "--kind", "b", "--fast"]
    monkeypatch.setattr("sys.argv", words)
    assert parse(Given, "it", None) == Given(3, (2, 4, 5), "b", True)


@pytest.mark.parametrize("words", [["--count", "x"], ["--count", "-1"], ["--kind", "c"]])
def test_wrong_options_end_with_the_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Wrong types and wrong values are reported alike."""
    monkeypatch.setattr("sys.argv", ["lab", *words])
    with pytest.raises(SystemExit):
        parse(Given, "it", None)
    assert words[0] in capsys.readouterr().err
