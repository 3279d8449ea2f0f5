"""The `slipstream` command."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Annotated

import typer
from pydantic import ValidationError

from online.api.auth import new_key
from online.errors import SlipstreamError
from online.processes import beat_command, decoder_command, worker_command
from online.settings import PREFIX, Settings, warn_about_unknown_variables
from online.stack import Stack

WATCH_S = 0.5  # between two looks at the children

app = typer.Typer(
    name="slipstream",
    help="Speculative decoding whose draft model learns from the traffic it serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def up() -> None:
    """Run the whole service on this machine until Ctrl-C."""
    settings = _settings_with_warnings()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A background job of a shell starts with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _serve(settings)
    except KeyboardInterrupt:
        print("stopped")


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from migrations import upgrade

    settings = _settings_with_warnings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.sql_url)


@app.command()
def decoder() -> None:
    """Run the decoder with the REST API."""
    _become(lambda settings: decoder_command())


@app.command()
def worker() -> None:
    """Run a trainer: a Celery worker."""
    _become(lambda settings: worker_command())


@app.command()
def beat() -> None:
    """Run the clock that starts training cycles."""
    _become(beat_command)


@app.command("settings")
def list_settings() -> None:
    """List every setting with its current value."""
    settings = _settings_with_warnings()
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        print(f"{PREFIX}{name.upper()}={shown}    {field.description or ''}".rstrip())


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Holder of the key; the audit shows this name.")],
) -> None:
    """Make an API key, and the entry that lets it in."""
    if not name or ":" in name or "," in name:
        sys.exit("slipstream: the name of a key can't be empty or contain ':' or ','")
    secret, digest = new_key()
    print(f"key, for its holder: {secret}")
    print(f"entry, for SLIPSTREAM_GENERATION_KEYS or SLIPSTREAM_ADMIN_KEYS: {name}:{digest}")


def _serve(settings: Settings) -> None:
    started = time.monotonic()
    print(f"starting: logs in {settings.data_dir.absolute() / 'logs'}", flush=True)
    with Stack(settings) as stack:
        took_s = time.monotonic() - started
        print(f"serving on {stack.url} after {took_s:.1f} s; Ctrl-C stops everything", flush=True)
        if not settings.admin_keys:
            print(
                "no API keys are configured: every caller on this machine may generate "
                "and administer",
                flush=True,
            )
        while True:
            stack.watch()
            time.sleep(WATCH_S)


def _become(command: Callable[[Settings], list[str]]) -> None:
    """Replaces this process, so that signals reach the service itself. It gives the warnings."""
    line = command(_settings())
    os.execv(line[0], line)


def _settings_with_warnings() -> Settings:
    warn_about_unknown_variables()
    return _settings()


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        sys.exit("\n".join(_fault(each["loc"], each["msg"]) for each in error.errors()))


def _fault(path: tuple[int | str, ...], message: str) -> str:
    return f"{PREFIX}{str(path[0]).upper() if path else '*'}: {message}"


def main() -> None:
    try:
        app(prog_name="slipstream")
    except SlipstreamError as error:
        sys.exit(f"slipstream: {error}")


if __name__ == "__main__":
    main()
