"""The lab's studies at their smallest: they end, and say what they promise."""

from pathlib import Path

import pytest

import lab.__main__
from lab.studies import gate
from tests.lab.conftest import Command
from tests.tiny import TinyPair


def test_the_gate_s_study_ends_with_its_figures(command: Command, pair: TinyPair) -> None:
    """Shares of draws, of candidates that learn by the service's recipe."""
    options = ["--draft", str(pair.spoilt), "--lessons", "6", "--noisy", "2", "--draws", "4"]
    figures = command(gate.main, *options, held_out="")
    assert 0 <= figures["false_promotion"] <= 1
    assert figures["answers"] == 10


@pytest.mark.parametrize("name", ["gate", "cold-start", "g2sd", "two-stage"])
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
