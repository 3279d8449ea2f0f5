"""Replays by name, over a folder of prompts or over installed packages."""

from pathlib import Path
from typing import Any, Literal

from lab.corpus import held_out_packages
from lab.replay.config import Domain, Replay, Segment

PresetName = Literal["abrupt", "gradual", "mixture", "recurring", "embedded"]
DOMAINS = ("math", "sql", "shell", "code")
SHARED = Path(__file__).resolve().parents[3] / "shared"  # models and data beside the checkout


def shared_data(data: Path | None) -> Path | None:
    """The folder that was given, or the shared one where there is one."""
    folder = SHARED / "data"
    return data or (folder if folder.is_dir() else None)


def shared_pair() -> dict[str, str]:
    """`target` and `draft` beside the shared data; empty where there are none."""
    pair = SHARED / "models" / "pair"
    return {name: str(pair / name) for name in ("target", "draft")} if pair.is_dir() else {}


def preset(name: str, data: Path | None, queries: int, **more: Any) -> Replay:
    """A preset over a folder with `train/` and `stream/`; without one, over installed packages."""
    if name == "embedded" or data is None:
        names = held_out_packages()[: 2 if name == "embedded" else len(DOMAINS)]
        domains = {
            package.lower(): Domain(traffic=f"package:{package}", held_out=f"package:{package}")
            for package in names
        }
    else:
        sides = {"traffic": "train", "held_out": "stream"}
        domains = {
            domain: Domain(**{key: f"{data}/{side}/{domain}.jsonl" for key, side in sides.items()})
            for domain in DOMAINS
        }
    if name == "recurring":
        domains = dict(list(domains.items())[:2])
    return Replay(domains=domains, segments=segments(name, list(domains), queries), **more)


def segments(name: str, domains: list[str], queries: int) -> list[Segment]:
    """Segments with `queries` of every domain."""
    only = [{domain: 1.0} for domain in domains]
    if name == "mixture":
        return [Segment(queries=queries * len(domains), mix=dict.fromkeys(domains, 1.0))]
    if name == "recurring":
        return [Segment(queries=queries, mix=mix) for mix in only * 2]
    if name == "gradual":  # half of the first domain, each fades into the next, half of the last
        half = max(1, queries // 2)
        fades = [Segment(queries=queries, mix=mix, fade=True) for mix in only[1:]]
        return [Segment(queries=half, mix=only[0]), *fades, Segment(queries=half, mix=only[-1])]
    return [Segment(queries=queries, mix=mix) for mix in only]
