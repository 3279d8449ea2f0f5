"""Settings: read from variables, validated, and passed on to children."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from online.processes import environment
from online.settings import Settings, warn_about_unknown_variables
from online.speculation import DraftingOptions

HASH = "a" * 64


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables of the machine that runs the tests."""
    import os

    for name in list(os.environ):
        if name.startswith("SLIPSTREAM_"):
            monkeypatch.delenv(name)


def test_children_get_the_settings_of_their_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every field survives the way through the environment."""
    settings = Settings(
        data_dir=tmp_path,
        routes=("a", "b"),
        closed_routes=("b",),
        generation_keys=(f"app:{HASH}",),
        admin_keys=(f"ops:{HASH}",),
        tick_s=0.25,
        drafters={
            "a": DraftingOptions(drafter="tree", widths=[2, 1]),
            "b": DraftingOptions(gamma=3),
        },
        artifacts_dir=tmp_path / "weights",
        database_url="postgresql://u:p%40ss@h/d",
    )
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"routes": ""}, "at least one"),
        ({"routes": "Default"}, "lower-case"),
        ({"closed_routes": "x"}, "not among routes"),
        ({"cycle_min_signals": 10, "cycle_max_signals": 5}, "below"),
        ({"admin_keys": f"ops:{HASH}"}, "go together"),
        ({"admin_keys": "plain"}, "name:sha256"),
        ({"gamma": 17}, "less than or equal to 16"),
        ({"dtype": "int8"}, "pattern"),
        ({"drafters": {"x": {"drafter": "tree"}}}, "not among routes"),
        ({"drafters": {"default": {"widths": [2]}}}, "for the drafter"),
        ({"learnt_routes": 9}, "less than or equal to 8"),
        (
            {"routes": "a,a-c2", "learnt_routes": 2},
            r"learnt_routes: \['a-c2'\] would be names of clusters",
        ),
        ({"routes": "a" * 61, "learnt_routes": 1}, "too long a name"),
        ({"closed_routes": "default", "learnt_routes": 1}, "nothing would be learnt"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, object], said: str) -> None:
    """With the reason."""
    with pytest.raises(ValidationError, match=said):
        Settings(**given)  # type: ignore[arg-type]


def test_the_server_is_open_to_others_only_with_keys() -> None:
    """Unless `host` names an address."""
    keys = {"generation_keys": (f"app:{HASH}",), "admin_keys": (f"ops:{HASH}",)}
    assert Settings().bind_host == "127.0.0.1"
    assert Settings(**keys).bind_host == "0.0.0.0"  # type: ignore[arg-type]
    assert Settings(host="10.0.0.1").bind_host == "10.0.0.1"


def test_clusters_are_additional_routes() -> None:
    """Only the default route has them, and only if the settings ask for them."""
    assert Settings().served_routes == ("default",)
    learnt = Settings(routes=("a", "b"), learnt_routes=2)
    assert learnt.cluster_routes == ("a-c1", "a-c2")
    assert learnt.served_routes == ("a", "b", "a-c1", "a-c2")


def test_every_setting_is_described() -> None:
    """`slipstream settings` shows the description."""
    assert all(field.description for field in Settings.model_fields.values())


def test_unknown_variables_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt or removed setting has no effect. The warning suggests a similar name."""
    names = ["SLIPSTREAM_WORTH_GAIN", "SLIPSTREAM_RETENTION", "slipstream_port", "PATH"]
    warn_about_unknown_variables(names)
    assert [record.getMessage() for record in caplog.records] == [
        "SLIPSTREAM_RETENTION is not a setting and has no effect; "
        "did you mean SLIPSTREAM_RETENTION_S?",
        "SLIPSTREAM_WORTH_GAIN is not a setting and has no effect",
    ]


def test_variables_of_the_process_are_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A child's environment is complete and known: it gives no warning."""
    for name, value in environment(Settings(data_dir=tmp_path)).items():
        monkeypatch.setenv(name, value)
    warn_about_unknown_variables()
    assert not caplog.records
    monkeypatch.setenv("SLIPSTREAM_SIGNAL_QUEUE", "9")
    warn_about_unknown_variables()
    assert "SLIPSTREAM_SIGNAL_QUEUE" in caplog.text
