"""`python -m lab replay`: replays real queries through the whole loop, and shows what is learnt.

One process runs the engine, its recorder, a real Redis-protocol buffer, a registry, training
cycles, the gate and swaps. Every arm answers the same stream; the frozen first draft and no
speculation are compared with it. Everything is kept in --out: a stopped run goes on from there.
"""

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lab.options import Dtype, option, parse
from lab.output import finish, rounded
from lab.replay.config import Arm, Replay, read
from lab.replay.figures import figures
from lab.replay.log import Log
from lab.replay.presets import PresetName, preset, shared_data, shared_pair
from lab.replay.report import draw, show
from lab.replay.run import ArmRun
from online.processes import die_with_parent

# Fields that may change from one run in a folder to the next.
MAY_CHANGE = ("seeds", "arms", "wall_queries", "wall_rounds")


@dataclass(frozen=True, kw_only=True)
class Options:
    preset: PresetName | None = option(None, "over --data, or installed packages without it")
    config: Path | None = option(None, "TOML file with the fields of lab.replay.config.Replay")
    data: Path | None = option(
        None, "folder with train/DOMAIN.jsonl and stream/DOMAIN.jsonl (default: ../shared/data)"
    )
    target: str | None = option(None, "folder or hub id (default: models/pair beside the data)")
    draft: str | None = option(None, "folder or hub id (default: as for the target)")
    dtype: Dtype | None = option(None, "of both models")
    queries: int | None = option(None, "of every domain of a preset (default: 1000)")
    seeds: tuple[int, ...] | None = option(None, "one run each; a headline needs three")
    arm: tuple[str, ...] = option((), "NAME=JSON, settings of a further arm; may be repeated")
    held_out: int | None = option(None, "held-out queries of a domain, each sampled and greedy")
    no_wall: bool = option(False, "do not compare tokens per second")
    jobs: int = option(1, "runs at once, which share the cores; tokens/s are timed after all")
    out: Path | None = option(None, "folder for everything (default: .slipstream/replay/NAME)")

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.config is None):
            raise ValueError("one of --preset and --config is required")
        if self.jobs < 1:
            raise ValueError("--jobs: at least 1")
        if self.config and (self.queries or self.data):
            raise ValueError("--queries and --data are for presets, not for a --config")
        if self.preset == "embedded" and self.data:
            raise ValueError("--preset embedded is over installed packages: it has no --data")

    @property
    def name(self) -> str:
        return self.preset or (self.config.stem if self.config else "")


def main() -> None:
    options = parse(Options, "replay", __doc__)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    out = options.out or Path(".slipstream", "replay", options.name)
    try:
        finish(replay(options, out))
    except KeyboardInterrupt:
        raise SystemExit(f"replay: stopped; the same command with --out {out} goes on") from None


def replay(options: Options, out: Path) -> dict[str, Any]:
    config = configured(options)
    # All arms of a seed before the next seed: what is there early can be compared.
    runs = [(config, arm, seed, out) for seed in config.seeds for arm in config.arms]
    _ = ArmRun(*runs[0]).held_out  # unreadable prompts are reported before anything is written
    check_same(config, out / "replay.json")
    _serve_all(runs, min(options.jobs, len(runs)))
    arms: dict[str, dict[int, Log]] = {arm.name: {} for arm in config.arms}
    for run in runs:
        arms[run[1].name][run[2]] = ArmRun(*run).time_speeds()
    found = rounded(figures(config, arms))
    chart = draw(config, arms, out / "chart.png")
    (out / "figures.json").write_text(json.dumps(found, indent=1))
    for name, domains in {config.arms[0].name: found["domains"], **found["arms"]}.items():
        show(name, domains)
    trained = f"{found['train_s']:.0f} s of training"
    print(f"{found['cycles']} cycles, {found['swaps']} swaps, {trained}; {chart}")
    return {**found, "chart": str(chart)}


def _serve_all(runs: Sequence[tuple[Replay, Arm, int, Path]], jobs: int) -> None:
    if jobs == 1:
        for run in runs:
            _serve(*run)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Spawned: a fork would copy the locks of torch's threads without the threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (threads,)) as pool:
        try:
            for done in [pool.submit(_serve, *run) for run in runs]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    """Prepares a worker, which ends with the command, however that ends."""
    if (end := die_with_parent()) is not None:
        end()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _serve(config: Replay, arm: Arm, seed: int, out: Path) -> None:
    ArmRun(config, arm, seed, out).serve_all()


def configured(options: Options) -> Replay:
    """The preset or file, with what the command line changes."""
    names = ("target", "draft", "dtype", "seeds", "held_out")
    given = {name: getattr(options, name) for name in names}
    more = {name: value for name, value in given.items() if value is not None}
    if options.no_wall:
        more["wall_queries"] = 0
    arms = [_arm(text) for text in options.arm]
    if options.config:
        config = read(options.config)
        return Replay(**{**config.model_dump(), **more, "arms": [*config.arms, *arms]})
    data = None if options.preset == "embedded" else shared_data(options.data)
    if data is not None and not options.target:
        more = shared_pair() | more
    arms = [Arm(name="loop"), *arms]
    return preset(options.name, data, options.queries or 1000, arms=arms, **more)


def _arm(text: str) -> Arm:
    name, _, settings = text.partition("=")
    try:
        return Arm(name=name, settings=json.loads(settings or "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--arm {name}: its settings are no JSON: {error}") from error


def check_same(config: Replay, path: Path) -> None:
    """Notes the configuration of a folder, to which later runs may add seeds and arms.

    Raises:
        ValueError: the folder holds a replay of another configuration.
    """
    own = config.model_dump()
    if path.exists():
        before = json.loads(path.read_text())
        arms = {arm["name"]: arm for arm in before.get("arms", ())}
        same_arms = all(arms.get(arm["name"], arm) == arm for arm in own["arms"])
        fixed = own.keys() - set(MAY_CHANGE)
        if not same_arms or any(before.get(key) != own[key] for key in fixed):
            other = f"{path.parent} holds a replay of another configuration"
            raise ValueError(f"{other}; choose another --out")
        added = {arm["name"] for arm in own["arms"]}
        own["arms"] += [arm for name, arm in arms.items() if name not in added]
    path.write_text(json.dumps(own, indent=1))
