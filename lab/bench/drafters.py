"""`python -m lab bench drafters`: every way to draft beside the chain, on real queries of several streams, in one run.

For each drafter short rounds find how many tokens it should draft; then all take turns on the same held-out queries,
half of them sampled at T = 1 and half greedy, with one sequence and with several at once. τ is tokens per target
forward; a target forward verifies the drafted tokens and the last one. Ratios are medians over turns, with 95 %
bootstrap intervals. `exact_tv` is the total variation between what a drafter's way of verifying emits and the target
alone, by enumeration.

A first draft that knows nothing of a stream shows little: give one that has learnt (`--draft`).
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoder.models import load_tokenizer
from decoder.verify import judge
from lab import rig
from lab.enumeration import SHAPES, Case, distance
from lab.replay import SHARED
from lab.replay.config import preset
from lab.replay.streams import Asked, exam
from lab.rig import Pair, Rig
from lab.statistics import median_ratio, rounded
from online.messages import DrafterName, Query

CANDIDATES: dict[DrafterName, tuple[int, ...]] = {
    "chain": (1, 2, 3, 4, 6, 8),
    "tree": (2, 3, 4, 6, 9, 14),
    "ngrams": (2, 4, 6, 8, 12),
    "cascade": (2, 4, 6, 8, 12),
    "graph": (2, 3, 4, 6, 9, 14),
}
ENUMERATED: dict[DrafterName, tuple[tuple[str, str], ...]] = {  # shapes, and how their candidates are drawn
    "chain": (("chain", "replaced"),),
    "tree": (("two, then two", "distinct"), ("two, then two", "replaced"), ("three at the root", "distinct")),
    "ngrams": (("chain", "chosen"),),
    "cascade": (("chain", "replaced"),),
    "graph": (("two, then two", "distinct"),),
}
SETTINGS = ((1.0, 0, 1.0), (1.3, 3, 0.8), (0.0, 0, 1.0))  # temperature, top-k, top-p
PLAIN = "plain"
ROUNDS = 3


@dataclass
class Turns:
    """What one way to draft did, turn by turn."""

    gamma: int
    speeds: list[float] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    computed: int = 0  # tokens that the draft model was fed
    forwards: int = 0  # of the draft model


class Bench:
    def __init__(self, serving: Rig, max_tokens: int) -> None:
        self._rig, self._max_tokens, self._asked = serving, max_tokens, 0
        self._computed = self._forwards = 0
        model = serving.engine.batch.drafts[rig.ROUTE].model
        model.forward = self._counted(model.forward)  # type: ignore[method-assign]

    def run(self, drafter: str, gamma: int, asked: Sequence[Asked], at_once: int) -> Turns:
        """One turn."""
        self._asked += 1
        kind: Any = {} if drafter == PLAIN else {"drafter": drafter}
        queries = [
            Query(
                id=f"{self._asked}-{one.name}",
                route=rig.ROUTE,
                prompt_ids=one.prompt_ids,
                max_tokens=self._max_tokens,
                temperature=one.temperature,
                seed=one.seed,
                gamma=gamma,
                store=False,
                **kind,
            )
            for one in asked
        ]
        computed, forwards, started = self._computed, self._forwards, time.perf_counter()
        answers = self._rig.complete(queries, at_once)
        seconds = time.perf_counter() - started
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{len(failed)} queries failed: {failed[0]}")
        tokens, stats = sum(len(answer.ids) for answer in answers), [answer.stats for answer in answers]
        return Turns(
            gamma,
            [tokens / seconds],
            tokens,
            sum(one.steps for one in stats),
            sum(one.drafted for one in stats),
            self._computed - computed,
            self._forwards - forwards,
        )

    def best(self, drafter: DrafterName, rounds: Sequence[Sequence[Asked]], at_once: int) -> int:
        """How many tokens it should draft."""
        speeds = dict.fromkeys(CANDIDATES[drafter], 0.0)
        for asked in rounds:
            for gamma in speeds:
                speeds[gamma] += self.run(drafter, gamma, asked, at_once).speeds[0]
        return max(speeds, key=lambda gamma: speeds[gamma])

    def _counted(self, forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(rows: Any, ids_BT: torch.Tensor, *more: Any) -> torch.Tensor:
            self._computed += ids_BT.numel()
            self._forwards += 1
            return forward(rows, ids_BT, *more)

        return counted


def compare(bench: Bench, asked: Sequence[Asked], at_once: int, args: argparse.Namespace) -> dict[str, Turns]:
    deal = lambda count, turn: [asked[(turn * count + i) % len(asked)] for i in range(count)]
    rounds = [deal(max(1, args.queries // 2), turn) for turn in range(ROUNDS)]
    found = {PLAIN: Turns(0)} | {name: Turns(bench.best(name, rounds, at_once)) for name in CANDIDATES}
    for turn in range(args.turns):
        names = list(found) if turn % 2 else list(found)[::-1]
        for name in names:
            one, all_ = bench.run(name, found[name].gamma, deal(args.queries, turn), at_once), found[name]
            all_.speeds += one.speeds
            for count in ("tokens", "steps", "drafted", "computed", "forwards"):
                setattr(all_, count, getattr(all_, count) + getattr(one, count))
    return found


def exact_tv(drafter: DrafterName) -> float:
    """The worst of its shapes and ways to draw, and of several settings, through the functions that serve."""
    cases = [
        Case.of(SHAPES[shape], way, setting, torch.float32)
        for shape, way in ENUMERATED[drafter]
        for setting in SETTINGS
    ]
    return max(distance(judge, case) for case in cases)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench drafters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with stream/DOMAIN.jsonl (default: ../shared/data, if there)")
    parser.add_argument("--target", default="", help="folder or hub id (default: beside the data, else the embedded)")
    parser.add_argument("--draft", default="", help="folder or hub id; one that has learnt shows most")
    parser.add_argument("--streams", nargs="+", help="of the data's domains (default: all)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="sequences (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=16, help="of a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    args = parser.parse_args()
    started = time.monotonic()
    figures = measure(args)
    figures["seconds"] = round(time.monotonic() - started)
    print(json.dumps(rounded(figures)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    data = args.data or (SHARED / "data" if (SHARED / "data").is_dir() else None)
    pair_folder = SHARED / "models" / "pair"
    if data is not None and pair_folder.is_dir():
        args.target = args.target or str(pair_folder / "target")
        args.draft = args.draft or str(pair_folder / "draft")
    domains = preset("abrupt" if data else "embedded", data, 1).domains
    if unknown := set(args.streams or ()) - set(domains):
        raise ValueError(f"--streams: {', '.join(sorted(unknown))} are not among {', '.join(domains)}")
    tokenizer = load_tokenizer(rig.files_of(args))
    held_out = max(ROUNDS * args.queries // 2, args.turns * args.queries) // 2
    asked = {
        name: _mixed(exam(name, domain.held_out, tokenizer, 700, held_out, 1))
        for name, domain in domains.items()
        if not args.streams or name in args.streams
    }
    prompts = [list(one.prompt_ids) for each in asked.values() for one in each]
    pair = Pair(rig.files_of(args), prompts, args.dtype, args.device, args.threads or torch.get_num_threads())
    exact = {name: exact_tv(name) for name in CANDIDATES}
    found: dict[str, Any] = {name: {} for name in CANDIDATES}
    _head()
    with rig.rig(pair, pair.files.draft, max(args.at_once), max_tokens=args.max_tokens, kept_contexts=0) as serving:
        bench = Bench(serving, args.max_tokens)
        for stream, queries in asked.items():
            for at_once in args.at_once:
                turns = compare(bench, queries, at_once, args)
                _table(stream, at_once, turns)
                for name in CANDIDATES:
                    told = found[name].setdefault(stream, {"exact_tv": exact[name]})
                    suffix = "" if at_once == 1 else f"_{at_once}"
                    told |= {key + suffix: value for key, value in _told(turns, name).items()}
    return {"drafters": found}


def _mixed(asked: Sequence[Asked]) -> list[Asked]:
    """Sampled and greedy ones by turns."""
    half = len(asked) // 2
    greedy = [replace(one, name=f"{one.name}-greedy") for one in asked[half:]]
    return [one for pair in zip(asked[:half], greedy, strict=True) for one in pair]


def _told(turns: dict[str, Turns], name: str) -> dict[str, Any]:
    one, found = turns[name], {}
    for other in ("chain", PLAIN):
        ratio = median_ratio(np.array(one.speeds) / np.array(turns[other].speeds))
        found[f"tokens_per_s_vs_{other}"] = [ratio.value, ratio.low, ratio.high]
    return {
        "gamma": one.gamma,
        "tau": one.tokens / one.steps,
        "verified_per_token": (one.drafted + one.steps) / one.tokens,
        "draft_forwards_per_step": one.forwards / one.steps,
        "draft_tokens_per_step": one.computed / one.steps,
        **found,
    }


def _head() -> None:
    print(
        f"{'stream':10} {'at once':>7} {'drafter':10} {'drafts':>6} {'τ':>5} {'verified':>8} {'forwards':>8}"
        f" {'tokens/s':>9}   over the chain (95 %)   over plain",
        flush=True,
    )


def _table(stream: str, at_once: int, turns: dict[str, Turns]) -> None:
    for name, one in turns.items():
        told = _told(turns, name)
        chain, plain = told["tokens_per_s_vs_chain"], told["tokens_per_s_vs_plain"]
        print(
            f"{stream:10} {at_once:7} {name:10} {one.gamma:6} {told['tau']:5.2f} {told['verified_per_token']:8.2f}"
            f" {told['draft_forwards_per_step']:8.2f} {np.median(one.speeds):9.1f}"
            f"   {chain[0]:.2f} ({chain[1]:.2f} to {chain[2]:.2f})     {plain[0]:.2f}",
            flush=True,
        )
