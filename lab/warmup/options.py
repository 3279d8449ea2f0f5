"""Command-line options of the warm-up commands, and their lines of progress."""

import argparse
from pathlib import Path

import transformers

from lab import rig


def say(line: str) -> None:
    print(line, flush=True)


def parser(command: str, doc: str | None, prompt_count: int) -> argparse.ArgumentParser:
    """A parser with the options of a rig."""
    transformers.utils.logging.disable_progress_bar()
    made = argparse.ArgumentParser(prog=f"python -m lab {command}", description=doc)
    rig.add_arguments(made)
    made.set_defaults(prompt_count=prompt_count)
    add(made, max_tokens=(96, "of an answer"))
    return made


def add(parser: argparse.ArgumentParser, **options: tuple[str | int | float, str]) -> None:
    """Adds `--name` options, each with its default and its help."""
    for name, (default, text) in options.items():
        flag = f"--{name.replace('_', '-')}"
        described = f"{text} (default: %(default)s)".strip()
        parser.add_argument(flag, type=type(default), default=default, help=described)


def add_held_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--held-out",
        type=Path,
        help="prompts to compare on (default: one in five, or other files' code)",
    )
    add(parser, held_out_count=(100, "prompts taken from there"))
