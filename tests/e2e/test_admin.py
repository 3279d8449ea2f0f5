"""The admin endpoints: what is active, who changed it and why, and the changes themselves."""

import pytest
import safetensors.torch

from tests.e2e.conftest import Served
from tests.loop.conftest import until
from tests.tiny import TinyPair


def test_a_route_shows_active_and_loaded_version(own: Served) -> None:
    """And the depth of its buffer."""
    own.complete()
    route = own.route()
    assert (route["active_version"], route["loaded_version"], route["load_error"]) == (1, 1, "")
    assert (route["frozen"], route["closed"], own.route("closed")["closed"]) == (False, False, True)
    assert {r["name"] for r in own.http.get("/admin/routes").json()["routes"]} == {
        "default",
        "closed",
        "other",
    }


def test_activate_and_roll_back_with_history(own: Served, pair: TinyPair) -> None:
    """Every change is an activation and an audit row, with author, time and reason."""
    second = own.register(pair.spoilt)
    own.activate(second, reason="trying it")
    back = own.post("/admin/routes/default/rollback", reason="it was worse")
    assert back.status_code == 200
    own.running(1)
    history = own.http.get("/admin/activations?route=default").json()["activations"]
    assert [
        (a["kind"], a["from_version"], a["to_version"], a["actor"], a["reason"]) for a in history
    ] == [
        ("rollback", second, 1, "local", "it was worse"),
        ("manual", 1, second, "local", "trying it"),
        ("initial", None, 1, "decoder", "first draft of this route"),
    ]
    assert all(a["created_at"] for a in history)
    actions = [a["action"] for a in own.http.get("/admin/audit").json()["audit"]]
    assert actions[:2] == ["activate:rollback", "activate:manual"]
    again = own.post("/admin/routes/default/rollback", reason="once more")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "nothing_to_roll_back")


def test_versions_show_their_gate_report(own: Served, pair: TinyPair) -> None:
    """In the list, newest first, and by number."""
    second = own.register(pair.spoilt)
    listed = own.http.get("/admin/routes/default/versions").json()
    assert ([v["id"] for v in listed["versions"]], listed["active_version"]) == ([second, 1], 1)
    shown = own.http.get(f"/admin/versions/{second}").json()
    assert shown == listed["versions"][0]
    assert {
        "sha256",
        "gate",
        "recipe",
        "window",
        "parent_id",
        "git_commit",
        "created_by",
    } <= shown.keys()


def test_freeze_and_unfreeze(own: Served) -> None:
    """The route shows it, and both changes are audited."""
    assert own.post("/admin/routes/default/freeze", reason="release week").json()["frozen"]
    assert own.route()["frozen"]
    assert not own.post("/admin/routes/default/unfreeze", reason="over").json()["frozen"]
    rows = own.http.get("/admin/audit").json()["audit"]
    assert [(r["action"], r["reason"]) for r in rows[:2]] == [
        ("unfreeze", "over"),
        ("freeze", "release week"),
    ]


def test_a_cycle_is_started_once(own: Served) -> None:
    """A second start returns the first cycle and says that it is not new."""
    first = own.post("/admin/routes/default/cycles", reason="now, please")
    second = own.post("/admin/routes/default/cycles", reason="me too")
    assert (first.status_code, first.json()["started"], second.json()["started"]) == (
        202,
        True,
        False,
    )
    assert (
        first.json()["cycle"]["id"]
        == second.json()["cycle"]["id"]
        == own.route()["unfinished_cycle"]["id"]
    )
    assert own.http.get("/admin/cycles?route=default").json()["cycles"][0]["state"] == "queued"


@pytest.mark.parametrize(
    ("damage", "code"), [("missing", "artifact_missing"), ("truncated", "artifact_invalid")]
)
def test_damaged_weights_are_refused(own: Served, pair: TinyPair, damage: str, code: str) -> None:
    """The old version stays active and serves."""
    bad = own.register(pair.spoilt)
    folder = own.artifacts.path(own.registry.version(bad).sha256)
    if damage == "missing":
        folder.rename(folder.with_name("gone"))
    else:
        weights = folder / "model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-100])
    refused = own.post("/admin/routes/default/activate", version=bad, reason="x")
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == code
    assert own.route()["active_version"] == 1
    assert own.complete()["choices"][0]["text"]


def test_weights_of_another_shape_are_not_loaded(own: Served, pair: TinyPair) -> None:
    """Nothing reaches the device. The old version serves, and the route shows the error."""
    folder = own.settings.data_dir / "odd"
    folder.mkdir()
    weights = safetensors.torch.load_file(pair.draft / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:100].clone()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((pair.draft / "config.json").read_text())
    bad = own.register(folder)
    answer = own.post("/admin/routes/default/activate", version=bad, reason="x")
    assert answer.status_code == 200
    until(lambda: own.route()["load_error"])
    assert "lm_head.weight has shape (100, 32)" in own.route()["load_error"]
    assert (own.route()["loaded_version"], own.route()["active_version"]) == (1, bad)
    assert own.complete()["choices"][0]["text"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("default/activate", {"version": 999, "reason": "x"}, 404, "version"),
        ("default/activate", {"version": 2**40, "reason": "x"}, 404, "version"),
        ("default/activate", {"version": 1, "reason": "x"}, 409, "version"),
        ("default/activate", {"version": "1", "reason": "x"}, 400, "version"),
        ("default/activate", {"version": 1}, 400, "reason"),
        ("default/activate", {"version": 1, "reason": ""}, 400, "reason"),
        ("nowhere/rollback", {"reason": "x"}, 404, "route"),
        ("default/rollback", {}, 400, "reason"),
        ("default/rollback", {"reason": "x", "force": True}, 400, "force"),
        ("other/activate", {"version": 1, "reason": "x"}, 409, "version"),
        ("default/canary/promote", {}, 400, "reason"),
        ("default/canary/abort", {"reason": "x"}, 404, None),
        ("nowhere/canary/abort", {"reason": "x"}, 404, "route"),
    ],
)
def test_invalid_changes_are_refused(
    own: Served, path: str, body: dict[str, object], status: int, param: str | None
) -> None:
    """4xx with the field. There is no activation and no audit row."""
    before = len(own.registry.audit())
    answer = own.http.post(f"/admin/routes/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert len(own.registry.audit()) == before


def test_metrics_have_vllms_names_and_our_own(own: Served) -> None:
    """Dashboards for vLLM work, and the training loop has metrics of its own."""
    own.complete()
    text = own.http.get("/metrics").text
    for name in (
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="0"}',
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}',
        'slipstream_active_version{route="default"} 1.0',
        'slipstream_loaded_version{route="default"} 1.0',
        "slipstream_swap_pause_seconds_bucket",
        'slipstream_buffer_signals{route="default"}',
        'slipstream_buffer_bytes{route="default"}',
    ):
        assert name in text, name
