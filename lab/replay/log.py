"""The log of one arm with one seed, from which a stopped run goes on."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab.output import rounded

Event = dict[str, Any]


class Log:
    """Events as JSON lines. A line that a kill has cut short is dropped, and its event repeated.

    The report is made from the log alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
        self.events: list[Event] = [json.loads(line) for line in whole.splitlines()]

    def add(self, kind: str, at: int, **more: Any) -> None:
        event: Event = rounded({"kind": kind, "at": at, **more})
        self.events.append(event)
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def of(self, kind: str, **fields: Any) -> list[Event]:
        """Events of a kind that have these fields."""
        found = [event for event in self.events if event["kind"] == kind]
        return [e for e in found if all(e.get(key) == value for key, value in fields.items())]

    @property
    def served(self) -> int:
        return sum(len(event["rows"]) for event in self.of("served"))


Logs = Mapping[int, Log]  # by seed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder: two processes would write one log, one database and one Redis.

    Raises:
        ValueError: another replay runs in this folder.
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another replay is at work here") from error
        yield
