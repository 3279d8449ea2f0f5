"""What tests of the lab's commands share."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lab.__main__
from tests.tiny import TinyPair

Command = Callable[..., dict[str, Any]]


def prompts(path: Path, count: int, what: str) -> str:
    path.write_text(
        "".join(json.dumps({"prompt": f"def {what}_{i}(value)"}) + "\n" for i in range(count))
    )
    return str(path)


@pytest.fixture
def command(
    pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Command]:
    """Runs a command on the tiny target, and gives the JSON of its last line."""
    threads = torch.get_num_threads()
    asked = prompts(tmp_path / "asked.jsonl", 16, "name")
    held_out = prompts(tmp_path / "held_out.jsonl", 10, "other")
    monkeypatch.setenv("SLIPSTREAM_DATA_DIR", str(tmp_path / "state"))

    def run(name: str, *options: str) -> dict[str, Any]:
        given = ["--target", str(pair.target), "--threads", "1", "--max-tokens", "8"]
        if "--unprompted" not in options:
            given += ["--prompts", asked]
        if name != "cold-start":
            given += ["--held-out", held_out]
        monkeypatch.setattr(sys, "argv", ["lab", name, *given, *options])
        lab.__main__.main()
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    yield run
    torch.set_num_threads(threads)
