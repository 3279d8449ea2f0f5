"""What every command prints: progress with the time, tables, and one line of JSON at the end."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

STARTED = time.monotonic()
TINY = 1e-3
WIDTH = 160  # columns of a table that does not go to a terminal


def say(line: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {line}", flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Prints a table: names to the left, figures to the right."""
    shown = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left")
    for number, name in enumerate(head):
        shown.add_column(name, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*map(str, row))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(shown)


def finish(figures: Mapping[str, Any]) -> None:
    """Prints the figures as the last line; `seconds` is the time since the command began."""
    seconds = round(time.monotonic() - STARTED, 1)
    print(json.dumps(rounded({"seconds": seconds, **figures})), flush=True)


def rounded(value: Any) -> Any:
    """The same with floats of four decimals, or two digits where a float is tiny."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.2g}") if abs(value) < TINY else round(float(value), 4)
