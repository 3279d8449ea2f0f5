"""What a load may leave behind: memory, sequences, slots."""

import time
from dataclasses import replace
from pathlib import Path

from lab import rig
from lab.streams import Load
from online.messages import Query

IDLE_LIMIT_S = 10.0


def leaked_slots(serving: rig.Rig, prompt: list[int]) -> int:
    """Sequences and waiting queries of an idle engine, and slots that it can no longer fill."""
    engine, slots = serving.engine, serving.engine.limits.slots
    deadline = time.monotonic() + IDLE_LIMIT_S
    while (left := engine.running + engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left + slots - _together(serving, prompt, slots)


def _together(serving: rig.Rig, prompt: list[int], slots: int) -> int:
    """Of `slots` requests: those answered, or those that ran together if that is less."""
    engine, running = serving.engine, [0]
    query = Query("", rig.ROUTE, tuple(prompt), 32, 0.0, gamma=0, ignore_eos=True, store=False)
    queries = (replace(query, id=f"after {i}") for i in range(slots))
    load = Load(engine, slots, seen=lambda stream: running.append(engine.running))
    answered = sum(stream.reason == "length" for stream in load.run(queries))
    return min(max(running), answered)


def rss_mib() -> float:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")
