"""The lab's replay over a tiny pair: the whole loop in one process, its figures, its resumption."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lab.replay.command import check_same, main
from lab.replay.config import Arm, Segment, read
from lab.replay.run import ArmRun
from tests.tiny import TinyPair
from trainer.cycle import run

KEYS = {
    *("tau_before", "tau_after", "tau_ratio_low", "acceptance_before", "acceptance_after"),
    *("wall_ratio", "wall_over_plain", "wall_ratio_8", "queries_to_recover", "forgetting"),
}


def toml(folder: Path, pair: TinyPair, queries: int = 80) -> Path:
    """Two domains of made-up prompts, one after the other; γ = 2, a cycle every 55 signals."""
    rng = random.Random(0)
    for name, letters in (("low", "abcdefgh"), ("high", "stuvwxyz")):
        for side in ("traffic", "held-out"):
            lines = [json.dumps({"prompt": "".join(rng.choices(letters, k=8))}) for _ in range(200)]
            (folder / f"{name}-{side}.jsonl").write_text("\n".join(lines))
    domains = [
        f'[domains.{name}]\ntraffic = "{folder}/{name}-traffic.jsonl"\n'
        f'held_out = "{folder}/{name}-held-out.jsonl"'
        for name in ("low", "high")
    ]
    parts = [
        f"[[segments]]\nqueries = {queries}\nmix = {{{name} = 1.0}}" for name in ("low", "high")
    ]
    top = f"""
target = "{pair.target}"
draft = "{pair.spoilt}"
max_tokens = 32
gamma = 2
held_out = 10
look_every = 20
wall_queries = 4
wall_rounds = 2
[settings]
cycle_min_signals = 55
recipe = {{learning_rate = 5e-3, epochs = 8}}
"""
    path = folder / "replay.toml"
    path.write_text("\n".join([top, *domains, *parts]))
    return path


def replayed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> dict[str, object]:
    """The command's last line."""
    monkeypatch.setattr("sys.argv", ["replay", *words])
    main()
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_replay_learns_reports_and_goes_on(
    pair: TinyPair,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts are swapped in, both domains gain, figures are complete; a second run adds nothing."""
    out = tmp_path / "out"
    words = ["--config", str(toml(tmp_path, pair)), "--out", str(out)]
    first = replayed(capsys, monkeypatch, *words)
    assert first["swaps"] > 0  # type: ignore[operator]
    for domain in ("low", "high"):
        figures = first["domains"][domain]  # type: ignore[index]
        assert figures.keys() >= KEYS
        assert figures["tau_after"] > figures["tau_before"]
        assert figures["gamma"]["plain"] == 0
    assert first["domains"]["low"]["forgetting"] is not None  # type: ignore[index]
    assert first["domains"]["high"]["queries_to_recover"] is not None  # type: ignore[index]
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "figures.json").read_text())["domains"] == first["domains"]
    again = replayed(capsys, monkeypatch, *words)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.parametrize(
    "where", ["while serving", "before a cycle ends", "after a cycle has ended"]
)
def test_a_stopped_replay_goes_on_where_it_was(
    pair: TinyPair, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query is answered once, no training is lost, and the log has each cycle and swap."""

    class Stopped(Exception): ...

    def stop(line: str) -> None:
        if "40/80" in line and where == "while serving":
            raise Stopped

    def work(*given: Any) -> str:
        if where == "after a cycle has ended":
            run(*given)
        raise Stopped

    config = read(toml(tmp_path, pair, queries=40)).model_copy(update={"wall_queries": 0})
    arm = config.arms[0]
    with monkeypatch.context() as patched:
        patched.setattr("lab.replay.service.run", work)
        patched.setattr("lab.replay.run.say", stop)
        with pytest.raises(Stopped):
            ArmRun(config, arm, 1, tmp_path).serve_all()
    log = ArmRun(config, arm, 1, tmp_path).serve_all()
    assert log.served == 80
    assert [event["at"] for event in log.of("served")] == [20, 40, 60, 80]
    assert len(log.of("held_out", at=0)) == 2
    versions = [event["version"] for event in log.of("swap")]
    assert versions == sorted(versions)
    assert len(log.of("cycle")) == len({event["id"] for event in log.of("cycle")}) > 0
    assert len(versions) == len(log.of("cycle", state="promoted"))


def test_an_arm_may_learn_routes(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters learn beside the live route, and each prompt is measured with its own draft."""
    monkeypatch.setattr("online.clustering.POOL", 40)
    arm = Arm(name="clusters", settings={"learnt_routes": 2, "cycle_min_signals": 24})
    config = read(toml(tmp_path, pair, queries=80)).model_copy(
        update={"wall_queries": 0, "arms": [arm]}
    )
    mixed = Segment(queries=160, mix={"low": 1.0, "high": 1.0})
    config = config.model_copy(update={"segments": [mixed]})
    log = ArmRun(config, arm, 1, tmp_path).serve_all()
    assert log.served == 160
    routes = {event["route"] for event in log.of("cycle")}
    assert {"live"} < routes <= {"live", "live-c1", "live-c2"}
    assert all(len(event["live_tau"]) == len(event["rows"]) for event in log.of("served"))
    first, last = log.of("first")[0]["domains"], log.of("swap")[-1]["domains"]
    assert all(last[domain]["tau"] > first[domain]["tau"] for domain in ("low", "high"))


def test_a_folder_keeps_its_configuration(pair: TinyPair, tmp_path: Path) -> None:
    """A folder holds one replay. Seeds and arms may be added; an arm's settings stay the same."""
    config, path = read(toml(tmp_path, pair)), tmp_path / "replay.json"
    before = config.model_copy(
        update={"arms": [Arm(name="loop"), Arm(name="other", settings={"tick_s": 2})]}
    )
    check_same(before, path)
    check_same(config.model_copy(update={"seeds": [1, 2], "wall_queries": 0}), path)
    assert [arm["name"] for arm in json.loads(path.read_text())["arms"]] == ["loop", "other"]
    changed = Arm(name="other", settings={"tick_s": 1})
    for change in ({"gamma": 3}, {"arms": [changed]}):
        with pytest.raises(ValueError, match="holds a replay of another configuration"):
            check_same(config.model_copy(update=change), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("greedy_share = 2", "greedy_share"),
        ("nonsense = 1", "nonsense"),
        ("seeds = [1, 1]", "seeds: 1 is there twice"),
        ('arms = [{name = "a", settings = {recipee = {}}}]', "the service has no setting recipee"),
        ("[[segments]]\nqueries = 5\nmix = {other = 1.0}", "other are not among domains"),
    ],
)
def test_an_invalid_configuration_is_refused(
    pair: TinyPair, tmp_path: Path, change: str, said: str
) -> None:
    """The error names the field and the reason."""
    path = toml(tmp_path, pair)
    path.write_text(
        path.read_text() + "\n" + change if change[0] == "[" else change + "\n" + path.read_text()
    )
    with pytest.raises(ValueError, match=said):
        read(path)
