"""The warm-up commands on tiny models: they end, and report their figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sqlalchemy import Engine
from transformers import AutoModelForCausalLM, AutoTokenizer

import lab.__main__
from decoder import reference
from decoder.models.loading import load_models
from decoder.rollout.live import LiveDraft
from lab.bench.system_process import over
from lab.bench.systems import Outcome
from lab.warmup import two_stage
from lab.warmup.cold_start import within
from lab.warmup.prompts import SOURCES, frame_of
from lab.warmup.register import opened, register
from online.artifacts import ArtifactStore
from online.database import connect
from online.errors import Conflict, InvalidRequest
from online.registry import Registry
from online.settings import Settings
from tests.conftest import copy_into
from tests.lab.conftest import Command, prompts
from tests.signals import taught
from tests.tiny import TinyPair
from trainer.examples import usable


def test_a_target_gets_its_first_draft_as_version_1(command: Command, tmp_path: Path) -> None:
    """From its own layers: published, registered with its origin, ready to swap in; once only."""
    out = tmp_path / "draft"
    options = ["--layers", "1", "--epochs", "1", "--out", str(out), "--register", "default"]
    figures = command("warm-up", *options)
    assert figures["initial"] == {"target_layers": [0]}
    assert (figures["answers"], figures["version"]) == (16, 1)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    version = Registry(connect(Settings().sql_url)).active("default")
    assert version is not None
    assert version.recipe["origin"] == "warm-up"
    assert version.recipe["initial"] == {"target_layers": [0]}
    assert version.gate["requests"] == 10
    (served,) = load_models(out, 1, 2, 32, torch.device("cpu"), "float32")
    LiveDraft("default", served).stage(
        ArtifactStore(Settings().artifacts_path).verify(version.sha256)
    )
    with pytest.raises(SystemExit, match="route 'default' has version 1"):
        command("warm-up", *options)


def test_a_draft_is_warmed_up_from_another(
    command: Command, pair: TinyPair, tmp_path: Path
) -> None:
    """The result has the shape of the other draft."""
    figures = command(
        "warm-up", "--draft", str(pair.spoilt), "--epochs", "1", "--out", str(tmp_path / "draft")
    )
    assert figures["initial"] == str(pair.spoilt)
    assert "version" not in figures
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "draft").config.num_hidden_layers == 2


def test_a_target_writes_its_own_queries_without_prompts(
    command: Command, pair: TinyPair, tmp_path: Path
) -> None:
    """The queries differ, and the draft is trained on them too."""
    options = ["--draft", str(pair.spoilt), "--epochs", "1", "--unprompted", "--prompt-count", "6"]
    figures = command("warm-up", *options, "--out", str(tmp_path / "draft"))
    assert figures["answers"] == 6
    assert figures["answer_tokens"] == figures["positions"] > 0


def test_a_route_with_a_version_keeps_it(pair: TinyPair, sqlite: Engine, tmp_path: Path) -> None:
    """The same holds if the other version came after the check."""
    registry, artifacts = Registry(sqlite), ArtifactStore(tmp_path / "artifacts")
    registry.ensure_routes(("default",))
    first = register(
        registry, artifacts, "default", lambda f: copy_into(pair.draft, f), {"epochs": 1}, {}
    )
    assert first.recipe == {"origin": "warm-up", "epochs": 1}
    with pytest.raises(Conflict, match="version 1, made by warm-up"):
        register(registry, artifacts, "default", lambda f: copy_into(pair.spoilt, f), {}, {})
    assert registry.active("default").id == first.id  # type: ignore[union-attr]
    assert len(registry.versions("default")) == 1


def test_a_route_that_the_service_does_not_have_is_refused(tmp_path: Path) -> None:
    """Nothing is written before the error."""
    with pytest.raises(InvalidRequest, match="not among SLIPSTREAM_ROUTES"):
        opened(Settings(data_dir=tmp_path / "state"), "sql")
    assert not (tmp_path / "state").exists()


def test_cold_starts_spend_the_same_tokens(command: Command, pair: TinyPair) -> None:
    """Every source of prompts has the same budget of target tokens."""
    words = f"--draft {pair.draft} --seeds 2 --rounds 2 --budget 24 --asked 4 --epochs 1"
    sources = ["--sources", *SOURCES]
    figures = command("cold-start", *words.split(), *sources, "--children", "2")
    assert set(figures["target_tokens"].values()) == {48}
    assert set(figures["tokens_per_step"]) == {"before", *SOURCES}
    assert set(figures["over_random"]) == set(SOURCES) - {"random"}


def test_a_budget_cuts_the_last_answer(pair: TinyPair) -> None:
    """Its remainder is still usable."""
    signals = taught(pair.target, 3, tokens=10)
    kept = within(signals, 14)
    assert [len(signal.output_ids) for signal in kept] == [10, 4]
    assert all(usable(signal, 320) for signal in kept)
    assert np.array_equal(kept[1].output_ids, signals[1].output_ids[:4])


def test_a_query_stands_where_the_template_has_it(pair: TinyPair) -> None:
    """It contains no special token."""
    frame = frame_of(AutoTokenizer.from_pretrained(pair.target))
    assert (frame.head, frame.tail, frame.never) == ([1], [2], [0, 1, 2, 3])


def test_two_stages_take_the_steps_of_one(command: Command, pair: TinyPair, tmp_path: Path) -> None:
    """All three schemes are measured on the held-out requests."""
    mixed = prompts(tmp_path / "mixed.jsonl", 16, "mixed")
    words = f"--draft {pair.draft} --generic {mixed} --epochs 1 --seeds 1"
    figures = command("g2sd", *words.split())
    assert figures["steps"] == 2 * 2
    assert figures["requests"] == 10
    assert set(figures["over_one_stage"]) == {"outputs, outputs", "features, outputs"}


def test_a_smaller_target_and_its_draft_are_made(
    command: Command, pair: TinyPair, tmp_path: Path
) -> None:
    """Writes four models; reports the distance to the teacher, and the shared draft."""
    options = ["--draft", str(pair.draft), "--epochs", "1", "--repetitions", "0"]
    figures = command("two-stage", *options, "--out", str(tmp_path / "out"))
    assert figures["layers"] == [0]
    assert figures["kl"]["after"][0] > 0
    for drafts in (figures["drafts"][who] for who in ("teacher", "smaller")):
        gain = drafts["common_tokens_per_step"] - drafts["tokens_per_step"]
        assert drafts["common_gain"][0] == pytest.approx(gain, abs=0.002)
    for name in ("target", "draft", "teachers-draft", "common-draft"):
        assert (tmp_path / "out" / name / "model.safetensors").is_file()


def test_speeds_are_ratios_to_the_plain_teacher() -> None:
    """By repetition, so that a slow spell of the machine cancels out."""
    slow = {"teacher": 1.0, "smaller": 0.5}
    results = {
        case.name: [
            Outcome(100, spell * slow[who] / (1 + case.drafts), steps=50) for spell in (1.0, 3.0)
        ]
        for who, case in two_stage.CONTESTANTS
    }
    assert {name: over(results, name, "teacher, plain").value for name in results} == {
        "teacher, plain": 1,
        "teacher, with a draft": 2,
        "smaller, plain": 2,
        "smaller, with a draft": 4,
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("warm-up", ["--out", "x"]),
        ("cold-start", []),
        ("g2sd", ["--generic", "x"]),
        ("two-stage", ["--out", "x"]),
    ],
)
def test_an_unreadable_prompts_file_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, options: list[str]
) -> None:
    """The message names the command and the file; there is no traceback."""
    draft = ["--draft", str(reference.DRAFT)]
    words = ["lab", name, *draft, "--prompts", str(tmp_path / "none.jsonl"), *options]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match=rf"{name}: .*none.jsonl can't be read"):
        lab.__main__.main()
