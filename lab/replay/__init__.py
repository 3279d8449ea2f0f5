"""`python -m lab replay`: replays real queries through the whole loop, and shows what each way to learn gains.

One process runs the engine, its recorder, a real Redis-protocol buffer, a registry, training cycles, the gate and
swaps. Every arm answers the same stream; beside them stand the frozen first draft and no speculation. What has happened
is kept in --out: a run that was stopped goes on where it was.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

MAY_CHANGE = (
    "seeds",
    "arms",
    "wall_queries",
    "wall_turns",
    "drafters",
)  # from one run in a folder to the next
SHARED = (
    Path(__file__).resolve().parents[2].parent / "shared"
)  # a folder of models and data beside the checkout


def main() -> None:
    from lab.replay.config import PRESETS

    parser = argparse.ArgumentParser(
        prog="python -m lab replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--preset", choices=PRESETS, help="over --data, or over installed packages without it"
    )
    what.add_argument(
        "--config", type=Path, help="a TOML file with the fields of lab.replay.config.Replay"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with train/DOMAIN.jsonl and stream/DOMAIN.jsonl (default: ../shared/data where there is one)",
    )
    parser.add_argument(
        "--target",
        help="folder or hub id (default: beside the data, models/pair; else the embedded one)",
    )
    parser.add_argument("--draft", help="folder or hub id (default: as for the target)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--queries", type=int, help="of every domain of a preset (default: 1000)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="one run each; a headline needs three (default: 1)"
    )
    parser.add_argument(
        "--arm",
        action="append",
        metavar="NAME=JSON",
        help="settings of a further arm; may be repeated",
    )
    parser.add_argument(
        "--held-out", type=int, help="held-out queries of a domain, each sampled and greedy"
    )
    parser.add_argument(
        "--no-wall", action="store_true", help="leave the comparison of tokens per second out"
    )
    parser.add_argument(
        "--drafters",
        nargs="+",
        metavar="NAME",
        help="what is timed beside the live draft's chain (default: auto)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at once, which share the cores; tokens/s are timed after all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of logs, drafts and report (default: .slipstream/replay/NAME)",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error("--jobs: at least 1")
    if args.config and (args.queries or args.data):
        parser.error("--queries and --data are for presets: a configuration says its own")
    if args.preset == "embedded" and args.data:
        parser.error("--preset embedded is over installed packages: it has no --data")
    args.out = args.out or Path(".slipstream", "replay", args.preset or args.config.stem)
    try:
        figures = replay(args)
    except KeyboardInterrupt:
        sys.exit(f"replay: stopped; the same command with --out {args.out} goes on")
    print(json.dumps(figures))


def replay(args: argparse.Namespace) -> dict[str, Any]:
    import transformers

    from lab.replay import report
    from lab.statistics import rounded

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    started, config = time.monotonic(), _config(args)
    # All arms of a seed before the next seed: what is there early can be compared.
    runs = [(arm, seed) for seed in config.seeds for arm in config.arms]
    _arm_run(
        config, *runs[0], args.out, started
    )  # what can't be read is told before anything is written down
    _same_as_before(config, args.out / "replay.json")
    _go_all(config, runs, min(args.jobs, len(runs)), args.out, started)
    arms: dict[str, dict[int, Any]] = {arm.name: {} for arm in config.arms}
    for arm, seed in runs:
        arms[arm.name][seed] = _arm_run(config, arm, seed, args.out, started).time()
    found = report.figures(config, arms)
    found["seconds"] = round(time.monotonic() - started, 1)
    title = f"replay: {args.preset or args.config}"
    chart = report.draw(config, arms, args.out / "chart.png")
    found["report"] = str(report.write_html(config, found, chart, args.out / "report.html", title))
    for name, domains in ((config.arms[0].name, found["domains"]), *found["arms"].items()):
        print(f"\n{name}\n{report.table(domains)}")
    told = f"{found['cycles']} cycles, {found['swaps']} swaps, {found['train_s']:.0f} s of training"
    print(f"\n{told}; {found['report']}")
    return rounded(found)


def _arm_run(config: Any, arm: Any, seed: int, out: Path, started: float) -> Any:
    from lab.replay.run import ArmRun

    return ArmRun(
        config, arm, seed, out / f"{arm.name}-{seed}", partial(_say, started, f"{arm.name} {seed}")
    )


def _go_all(
    config: Any, runs: Sequence[tuple[Any, int]], jobs: int, out: Path, started: float
) -> None:
    if jobs == 1:
        for run in runs:
            _go(config, *run, out, started)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Not forked: this process has torch's threads, and a child would have their locks without them.
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _begin, (threads,)
    ) as pool:
        try:
            for done in [pool.submit(_go, config, *run, out, started) for run in runs]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(count: int) -> None:
    """A worker ends with the command, however that ends."""
    import torch
    import transformers

    from online.processes import die_with_parent

    if (end := die_with_parent()) is not None:
        end()
    torch.set_num_threads(count)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _go(config: Any, arm: Any, seed: int, out: Path, started: float) -> None:
    _arm_run(config, arm, seed, out, started).go()


def _say(started: float, who: str, line: str) -> None:
    print(f"[{time.monotonic() - started:6.0f} s] {who}: {line}", flush=True)


def _config(args: argparse.Namespace) -> Any:
    from lab.replay.config import Arm, preset, read

    given = {
        name: getattr(args, name)
        for name in ("target", "draft", "dtype", "seeds", "held_out", "drafters")
    }
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.no_wall:
        more["wall_queries"] = 0
    arms = [_arm(text) for text in args.arm or ()]
    if args.config:
        config = read(args.config)
        return type(config)(**{**config.model_dump(), **more, "arms": [*config.arms, *arms]})
    data = args.data or (SHARED / "data" if (SHARED / "data").is_dir() else None)
    pair = SHARED / "models" / "pair"
    if args.preset != "embedded" and data is not None and not args.target and pair.is_dir():
        more = {"target": str(pair / "target"), "draft": str(pair / "draft"), **more}
    return preset(args.preset, data, args.queries or 1000, arms=[Arm(name="loop"), *arms], **more)


def _arm(text: str) -> Any:
    from lab.replay.config import Arm

    name, _, settings = text.partition("=")
    try:
        return Arm(name=name, settings=json.loads(settings or "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--arm {name}: its settings are no JSON: {error}") from error


def _same_as_before(config: Any, path: Path) -> None:
    """A folder holds one replay: going on with another configuration would mix two. Seeds and arms may be added."""
    told = config.model_dump()
    if path.exists():
        before = json.loads(path.read_text())
        arms = {arm["name"]: arm for arm in before.get("arms", ())}
        same = all(arms.get(arm["name"], arm) == arm for arm in told["arms"])
        if not same or any(
            before.get(key) != value for key, value in told.items() if key not in MAY_CHANGE
        ):
            raise ValueError(
                f"{path.parent} holds a replay of another configuration; choose another --out"
            )
        told["arms"] += [
            arm for name, arm in arms.items() if name not in {arm["name"] for arm in told["arms"]}
        ]
    path.write_text(json.dumps(told, indent=1))
