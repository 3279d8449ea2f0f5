"""The lab's studies at their smallest: they end, and say what they promise."""

import json
from pathlib import Path

import pytest

import lab.__main__
from lab import gate, recipes
from tests.tiny import TinyPair
from tests.unit.conftest import Command


def test_the_gate_s_study_ends_with_its_figures(command: Command, pair: TinyPair) -> None:
    """Shares of draws, of candidates that learn by the service's recipe."""
    options = ["--draft", str(pair.spoilt), "--lessons", "6", "--noisy", "2", "--draws", "4"]
    figures = command(gate.main, *options, held_out="")
    assert 0 <= figures["false_promotion"] <= 1
    assert figures["answers"] == 10


def test_recipes_are_held_against_the_first(command: Command, pair: TinyPair) -> None:
    """Branches are there to learn from; the first recipe's ratio to itself is one."""
    given = [{"epochs": 1}, {"epochs": 1, "branch_tokens": 2}]
    options = [word for change in given for word in ("--recipe", json.dumps(change))]
    figures = command(recipes.main, "--draft", str(pair.spoilt), "--seeds", "2", *options)
    assert [row["recipe"] for row in figures["recipes"]] == given
    assert figures["recipes"][0]["over_first_recipe"] == [1, 1, 1]
    assert figures["recipes"][1]["over_first_recipe"] != [1, 1, 1]


@pytest.mark.parametrize("text", ["{", '{"nonsense": 1}'])
def test_a_recipe_that_is_none_is_named(command: Command, text: str) -> None:
    """Before anything is computed."""
    with pytest.raises(ValueError, match=r"no JSON|nonsense"):
        command(recipes.main, "--recipe", text)


@pytest.mark.parametrize(
    "name", ["recipes", "truncation", "gate", "cold-start", "g2sd", "two-stage"]
)
def test_what_can_t_be_read_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Which command, which file; no traceback."""
    words = ["lab", name, "--prompts", str(tmp_path / "none.jsonl")]
    words += (
        ["--generic", "x"]
        if name == "g2sd"
        else ["--out", str(tmp_path)]
        if name == "two-stage"
        else []
    )
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match=rf"{name}: .*none.jsonl can't be read"):
        lab.__main__.main()
