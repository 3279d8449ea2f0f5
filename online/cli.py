"""The `slipstream` command."""

import argparse
import logging
import signal
import sys
import time

from pydantic import ValidationError

from online.api.auth import new_key
from online.errors import SlipstreamError
from online.processes import beat_command, decoder_command, worker_command
from online.settings import Settings
from online.stack import Stack

COMMANDS = {
    "up": "run the whole service on this machine until Ctrl-C",
    "migrate": "bring the database to the newest schema",
    "decoder": "run the decoder with the REST API",
    "worker": "run a trainer: a Celery worker",
    "beat": "run the clock that starts training cycles",
    "settings": "list every setting with the value in force",
    "key": "make an API key and the entry that lets it in",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="slipstream",
        description="Speculative decoding whose draft model learns from the traffic it serves.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, description=what)
    commands.choices["key"].add_argument(
        "name", help="who holds it: written into the audit with every change"
    )
    args = parser.parse_args()
    if args.command == "key":
        _key(args.name)
        return
    try:
        settings = Settings()
    except ValidationError as error:
        sys.exit(
            "\n".join(
                f"SLIPSTREAM_{str(e['loc'][0]).upper() if e['loc'] else '*'}: {e['msg']}"
                for e in error.errors()
            )
        )
    try:
        _run(args.command, settings)
    except SlipstreamError as error:
        sys.exit(f"slipstream: {error}")


def _run(command: str, settings: Settings) -> None:
    if command == "up":
        _up(settings)
    elif command == "migrate":
        from migrations import upgrade

        settings.data_dir.mkdir(parents=True, exist_ok=True)
        upgrade(settings.sql_url)
    elif command == "settings":
        _settings(settings)
    else:
        commands = {
            "decoder": decoder_command(),
            "worker": worker_command(),
            "beat": beat_command(settings),
        }
        _become(commands[command])


def _up(settings: Settings) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job starts with it ignored
    started = time.monotonic()
    print(f"starting: logs in {settings.data_dir.absolute() / 'logs'}", flush=True)
    try:
        with Stack(settings) as stack:
            print(
                f"serving on {stack.url} after {time.monotonic() - started:.1f} s; Ctrl-C stops everything",
                flush=True,
            )
            if not settings.admin_keys:
                print(
                    "no API keys are configured: every caller on this machine may generate and administer",
                    flush=True,
                )
            while True:
                stack.watch()
                time.sleep(0.5)
    except KeyboardInterrupt:
        print("stopped")


def _become(command: list[str]) -> None:
    """Replaces this process, so that signals reach the real one."""
    import os

    os.execv(command[0], command)


def _settings(settings: Settings) -> None:
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        print(f"SLIPSTREAM_{name.upper()}={shown}    {field.description or ''}".rstrip())


def _key(name: str) -> None:
    if not name or ":" in name or "," in name:
        sys.exit("slipstream: a key's name can't be empty or hold ':' or ','")
    key, digest = new_key()
    print(f"key, for its holder: {key}")
    print(f"entry, for SLIPSTREAM_GENERATION_KEYS or SLIPSTREAM_ADMIN_KEYS: {name}:{digest}")


if __name__ == "__main__":
    main()
