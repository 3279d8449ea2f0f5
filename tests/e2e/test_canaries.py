"""Canaries under concurrent load: the service decides on its own, or an operator does."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from tests.e2e.conftest import Served, serve, tiny_settings
from tests.e2e.test_swaps import PROMPTS, load, mean_rate, versions
from tests.loop.conftest import until
from tests.tiny import TinyPair


def canaries(served: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = served.http.get("/admin/canaries?route=default").json()[
        "canaries"
    ]
    return found


def ended(served: Served) -> dict[str, Any]:
    """The newest canary, once it has ended."""
    return until(lambda: c if (c := canaries(served)[0])["finished_at"] else None)


def drafting(served: Served) -> None:
    """Waits until the canary drafts."""
    until(lambda: (c := served.route()["canary"]) and c["seen"])


def test_a_bad_candidate_is_aborted(own: Served, pair: TinyPair) -> None:
    """Outputs stay the target's. Acceptance falls only for requests of the canary."""
    expected = {
        prompt: own.complete(prompt, max_tokens=40)["choices"][0]["text"] for prompt in PROMPTS
    }
    with load(own) as answers:
        until(lambda: len(answers) >= 24)
        before = mean_rate(answers[:24])
        spoilt = own.canary(pair.spoilt)
        canary = ended(own)
        mark = len(answers)
        until(lambda: len(answers) >= mark + 20)
    assert (canary["state"], canary["actor"], canary["version"]) == ("aborted", "canary", spoilt)
    assert "below 0" in canary["reason"]
    arms = [[a for a in answers if versions(a) == {v}] for v in (1, spoilt)]
    assert mean_rate(arms[0]) > 0.9 * before
    assert mean_rate(arms[1]) < before / 2
    assert all(a["choices"][0]["text"] == expected[a["prompt"]] for a in answers)
    assert all(versions(a) == {1} for a in answers[-8:])
    assert own.route()["canary"] is None
    assert [a.kind for a in own.registry.activations("default")] == ["initial"]
    assert own.http.get("/health").status_code == 200


def test_a_better_candidate_is_promoted(pair: TinyPair, redis_url: str, tmp_path: Path) -> None:
    """The activation has the test's figures as its reason. No answer changes or gets lost."""
    with serve(tiny_settings(pair, tmp_path, redis_url, draft=str(pair.spoilt))) as served:
        with load(served) as answers:
            good = served.canary(pair.draft)
            served.running(good)
            mark = len(answers)
            until(lambda: len(answers) >= mark + 20)
        newest = served.registry.activations("default")[0]
        assert (newest.kind, newest.actor, newest.from_version, newest.to_version) == (
            "promotion",
            "canary",
            1,
            good,
        )
        assert "above −0.03" in newest.reason
        assert canaries(served)[0]["state"] == "promoted"
        assert all(versions(a) == {good} for a in answers[-8:])
        assert {a["prompt"]: a["choices"][0]["text"] for a in answers[:mark]} == {
            a["prompt"]: a["choices"][0]["text"] for a in answers[mark:]
        }


def test_a_manual_rollback_supersedes_a_canary(own: Served, pair: TinyPair) -> None:
    """The version beside it is gone. All requests go to the active version."""
    second = own.register(pair.draft)
    own.activate(second)
    own.canary(pair.draft)
    drafting(own)
    assert own.post("/admin/routes/default/rollback", reason="3 a.m.").status_code == 200
    own.running(1)
    canary = ended(own)
    assert (canary["state"], canary["actor"]) == ("superseded", "local")
    until(lambda: 'slipstream_canary_share{route="default"} 0.0' in own.http.get("/metrics").text)
    assert {v for i in range(12) for v in versions(own.complete(PROMPTS[i % 6]))} == {1}


def test_a_canary_on_a_frozen_route_is_held(own: Served, pair: TinyPair) -> None:
    """The decision is audited but not carried out until the route is unfrozen."""
    own.canary(pair.spoilt)
    own.post("/admin/routes/default/freeze", reason="release week")
    with load(own):
        until(lambda: [a for a in own.registry.audit() if a.action == "canary:held"])
        assert own.route()["canary"]["state"] == "running"
        own.post("/admin/routes/default/unfreeze", reason="over")
        assert ended(own)["state"] == "aborted"
    assert len([a for a in own.registry.audit() if a.action == "canary:held"]) == 1


@pytest.mark.parametrize("outcome", ["promote", "abort"])
def test_an_operator_may_decide(own: Served, pair: TinyPair, outcome: str) -> None:
    """The history has author and reason. Route and metrics show both arms."""
    version = own.canary(pair.draft)
    refused = own.post("/admin/routes/default/cycles", reason="now")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "canary_running")
    drafting(own)
    for i in range(16):
        own.complete(PROMPTS[i % 6])
    seen = until(lambda: s if (s := own.route()["canary"]["seen"])["canary"]["requests"] else None)
    assert (seen["canary"]["version"], seen["active"]["version"]) == (version, 1)
    assert 0 < seen["canary"]["acceptance"] <= 1
    assert (
        'slipstream_canary_acceptance{arm="canary",route="default"}'
        in own.http.get("/metrics").text
    )
    answer = own.post(f"/admin/routes/default/canary/{outcome}", reason="I have seen enough")
    state = "promoted" if outcome == "promote" else "aborted"
    assert answer.status_code == 200, answer.text
    canary = answer.json()["canary"]
    assert canary == ended(own)
    assert (canary["state"], canary["actor"], canary["reason"]) == (
        state,
        "local",
        "I have seen enough",
    )
    assert f"canary:{state}" in {a.action for a in own.registry.audit(3)}
    own.running(version if outcome == "promote" else 1)
    again = own.post(f"/admin/routes/default/canary/{outcome}", reason="again")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "no_canary")
    assert (
        f'slipstream_canaries{{route="default",state="{state}"}} 1.0'
        in own.http.get("/metrics").text
    )


def test_a_canary_that_cannot_be_loaded_is_aborted(
    own: Served, pair: TinyPair, tmp_path: Path
) -> None:
    """Its weights have another shape. Nothing reaches the device, and clients notice nothing."""
    folder = tmp_path / "odd"
    folder.mkdir()
    weights = safetensors.torch.load_file(pair.draft / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:100].clone()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((pair.draft / "config.json").read_text())
    own.canary(folder)
    canary = ended(own)
    assert canary["state"] == "aborted"
    assert "lm_head.weight has shape (100, 32)" in canary["reason"]
    assert versions(own.complete()) == {1}


def test_a_decoder_without_room_aborts_the_canary(
    pair: TinyPair, redis_url: str, tmp_path: Path
) -> None:
    """Its `canary_share` is 0, the trainer's is not. The candidate does not wait for ever."""
    with serve(tiny_settings(pair, tmp_path, redis_url, canary_share=0)) as served:
        served.canary(pair.draft)
        assert "no room" in ended(served)["reason"]


def test_two_decoders_of_a_route_end_a_canary_once(
    pair: TinyPair, redis_url: str, tmp_path: Path
) -> None:
    """Each tests on its own. The later one finds the canary ended and follows."""
    settings = tiny_settings(pair, tmp_path, redis_url)
    with serve(settings) as one, serve(settings) as other:
        one.canary(pair.spoilt)
        for served in (one, other):
            drafting(served)
        with load(one, 2), load(other, 2):
            assert ended(one)["state"] == "aborted"
            until(lambda: not any(s.route()["canary"] for s in (one, other)))
        share = 'slipstream_canary_share{route="default"} 0.0'
        until(lambda: all(share in s.http.get("/metrics").text for s in (one, other)))
        assert [a.action for a in one.registry.audit()].count("canary:aborted") == 1
        for served in (one, other):
            assert {v for i in range(12) for v in versions(served.complete(PROMPTS[i % 6]))} == {1}
