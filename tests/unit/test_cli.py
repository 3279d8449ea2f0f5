"""The `slipstream` command: its commands, their help, and keys."""

import pytest
from typer.testing import CliRunner

from online.api.auth import hash_key
from online.cli import app
from online.settings import Settings

COMMANDS = ["up", "migrate", "decoder", "worker", "beat", "settings", "key"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(flag: str) -> None:
    """With one line for each."""
    shown = CliRunner().invoke(app, [flag])
    assert shown.exit_code == 0
    listed = shown.output.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    """`--help` prints it and runs nothing."""
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Usage: slipstream {command}" in shown.output


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["key"]])
def test_wrong_usage_fails(arguments: list[str]) -> None:
    """With the status that shells expect."""
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_a_key_comes_with_its_entry() -> None:
    """The entry holds the name and the key's hash, and the settings accept it."""
    made = CliRunner().invoke(app, ["key", "alice"]).output.splitlines()
    key, entry = (line.rpartition(" ")[2] for line in made)
    assert entry == f"alice:{hash_key(key)}"
    assert Settings(generation_keys=entry, admin_keys=entry).admin_keys == (entry,)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a:b", "a,b"])
def test_a_key_needs_a_name_that_fits_in_an_entry(name: str) -> None:
    """Colons and commas separate entries."""
    refused = CliRunner().invoke(app, ["key", name])
    assert refused.exit_code == 1


def test_settings_are_listed_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, with the description."""
    monkeypatch.setenv("SLIPSTREAM_GAMMA", "3")
    lines = CliRunner().invoke(app, ["settings"]).output.splitlines()
    assert len(lines) == len(Settings.model_fields)
    assert any(line.startswith("SLIPSTREAM_GAMMA=3    maximum of drafted") for line in lines)
