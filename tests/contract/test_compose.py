"""docker-compose.yml matches the code: commands, variables, users and secrets."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from online.cli import app
from online.processes import ROOT
from online.settings import Settings

OURS = {"migrate", "decoder", "trainer", "beat"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def test_services_and_their_commands(compose: dict[str, Any]) -> None:
    """Redis, PostgreSQL, and our services, each of which runs a `slipstream` command."""
    services = compose["services"]
    assert set(services) == {"redis", "postgres"} | OURS
    commands = {services[name]["command"] for name in OURS}
    assert commands == {"migrate", "decoder", "worker", "beat"}
    assert commands <= {command.name for command in get_command(app).commands.values()}
    assert services["migrate"]["restart"] == "no"
    assert all("healthcheck" in service for name, service in services.items() if name != "migrate")


def test_every_variable_is_a_setting(compose: dict[str, Any]) -> None:
    """A misspelt variable would have no effect."""
    known = {f"SLIPSTREAM_{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        used = {v for v in compose["services"][name]["environment"] if v.startswith("SLIPSTREAM_")}
        assert used <= known, name
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "USER slipstream" in dockerfile
    assert "SLIPSTREAM_ARTIFACTS_DIR=/artifacts SLIPSTREAM_DATA_DIR=/data" in dockerfile
    assert 'ENTRYPOINT ["slipstream"]' in dockerfile


def test_values_are_accepted_by_the_settings(compose: dict[str, Any]) -> None:
    """With the defaults of the file and with keys."""
    for name in OURS:
        variables = compose["services"][name]["environment"]
        given = {
            v.removeprefix("SLIPSTREAM_").lower(): _filled(str(x))
            for v, x in variables.items()
            if v != "HF_HOME"
        }
        Settings(**given)  # type: ignore[arg-type]


def _filled(value: str) -> str:
    if value.startswith("${SLIPSTREAM_") and ":?" in value:
        return f"ops:{'a' * 64}"
    if value.startswith("${"):
        return value[2:-1].partition(":-")[2]
    return value


def test_secrets_are_not_in_the_file(compose: dict[str, Any]) -> None:
    """Passwords and keys come from the environment. Compose refuses to start without them."""
    assert compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith(
        "${POSTGRES_PASSWORD:?"
    )
    for name in ("SLIPSTREAM_GENERATION_KEYS", "SLIPSTREAM_ADMIN_KEYS"):
        assert compose["services"]["decoder"]["environment"][name].startswith(f"${{{name}:?")


def test_only_the_decoder_reserves_a_gpu(
    compose: dict[str, Any],
) -> None:
    """The override for CPUs removes the reservation and nothing else."""
    assert [n for n, s in compose["services"].items() if "deploy" in s] == ["decoder"]
    text = (ROOT / "docker-compose.cpu.yml").read_text()
    assert "SLIPSTREAM_DEVICE: cpu" in text
    assert "devices: !reset []" in text


@pytest.mark.parametrize("override", [False, True])
def test_docker_compose_accepts_the_files(override: bool, tmp_path: Path) -> None:
    """If the client is installed."""
    docker = shutil.which("docker")
    if (
        docker is None
        or subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    (tmp_path / "env").write_text(
        "POSTGRES_PASSWORD=x\n"
        + "".join(f"SLIPSTREAM_{k}_KEYS=a:{'0' * 64}\n" for k in ("GENERATION", "ADMIN"))
    )
    files = ["-f", "docker-compose.yml", *(["-f", "docker-compose.cpu.yml"] if override else [])]
    command = [docker, "compose", "--env-file", str(tmp_path / "env"), *files, "config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    decoder = yaml.safe_load(done.stdout)["services"]["decoder"]
    assert decoder["environment"]["SLIPSTREAM_DEVICE"] == ("cpu" if override else "cuda")
    assert (
        bool(decoder.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices"))
        != override
    )
