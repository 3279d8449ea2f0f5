"""`python -m lab bench drafters`: every way to draft beside the chain, on real queries of several streams, in one run.

For each drafter short rounds find how many tokens it should draft; then all take turns on the same held-out queries,
half of them sampled at T = 1 and half greedy, with one sequence and with several at once. τ is tokens per target
forward; a target forward verifies the drafted tokens and the last one. Ratios are medians over turns, with 95 %
bootstrap intervals. `exact_tv` is the total variation between what a drafter's way of verifying emits and the target
alone, by enumeration.

A first draft that knows nothing of a stream shows little: give one that has learnt (`--draft`), and masks, too, for the
drafters that need these. N-grams know what was answered before: `--answered` queries of every stream's other traffic.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from decoder.device.placement import device_of
from decoder.models.base import LayeredModel
from decoder.models.hidden import HiddenStates
from decoder.models.loading import load_tokenizer
from decoder.verification.verify import verify
from lab import rig
from lab.enumeration import distance, on
from lab.enumeration_cases import (
    CHOSEN_CHAIN,
    DRAWN_CHAIN,
    FIRST_CHOSEN,
    LAST_CHOSEN,
    SHAPES,
    WITH_REPLACEMENT,
    WITHOUT_REPLACEMENT,
    Case,
)
from lab.replay import SHARED
from lab.replay.config import Domain, preset
from lab.replay.streams import Asked, Source, exam, prompts
from lab.rig import Pair, Rig
from lab.statistics import rounded
from lab.turns import A_SEQUENCE, Turns, in_turn
from online.messages import DrafterName, Query

AS_IS_FASTEST = -1  # instead of a number of tokens: the engine's choice, before every step
CANDIDATES: dict[DrafterName, tuple[int, ...]] = {
    "chain": (1, 2, 3, 4, 6, AS_IS_FASTEST),
    "tree": (2, 3, 4, 6, 9, 14),
    "ngrams": (2, 4, 8, AS_IS_FASTEST),
    "cascade": (4, 8, AS_IS_FASTEST),
    "graph": (2, 3, 4, 6, 9, 14),
    "parallel": (2, 3, 4, 5),
    "parallel_cascade": (4, 8, AS_IS_FASTEST),
    "exits": (1, 2, 3, 4, 6),
    "auto": (AS_IS_FASTEST,),
}
ENUMERATED: dict[
    DrafterName, tuple[tuple[str, str], ...]
] = {  # shapes, and how their candidates are drawn
    "chain": (("chain", DRAWN_CHAIN),),
    "tree": (
        ("two, then two", WITHOUT_REPLACEMENT),
        ("two, then two", WITH_REPLACEMENT),
        ("three at the root", WITHOUT_REPLACEMENT),
    ),
    "ngrams": (("chain", CHOSEN_CHAIN),),
    "cascade": (("chain", DRAWN_CHAIN), ("chain", FIRST_CHOSEN), ("chain", LAST_CHOSEN)),
    "graph": (("two, then two", WITHOUT_REPLACEMENT),),
    "parallel": (("chain", DRAWN_CHAIN),),
    "parallel_cascade": (("chain", DRAWN_CHAIN), ("chain", FIRST_CHOSEN), ("chain", LAST_CHOSEN)),
    "exits": (("chain", DRAWN_CHAIN),),
    "auto": (
        ("chain", DRAWN_CHAIN),
        ("chain", CHOSEN_CHAIN),
        ("chain", FIRST_CHOSEN),
        ("chain", LAST_CHOSEN),
    ),
}
SETTINGS = ((1.0, 0, 1.0), (1.3, 3, 0.8), (0.0, 0, 1.0))  # temperature, top-k, top-p
PLAIN = "plain"
ROUNDS = 3
BEFORE = 8  # sequences at once while a service's earlier traffic is answered
LONGEST = 700  # tokens of a prompt
R = TypeVar("R")


@dataclass(kw_only=True)
class Contestant(Turns):
    """One way to draft."""

    drafter: DrafterName = "chain"
    gamma: int
    computed: float = 0  # tokens that the draft model was fed
    forwards: float = 0  # of the draft model


class Bench:
    def __init__(self, serving: Rig, max_tokens: int) -> None:
        self._rig, self._max_tokens, self._asked = serving, max_tokens, 0
        self._computed = self._forwards = 0.0
        model = serving.engine.batch.drafts[rig.ROUTE].model
        model.forward = self._counted(model.forward, torch.Tensor.numel)  # type: ignore[method-assign]
        if isinstance(model, LayeredModel):  # exits ask for layers one by one
            model.run_layer = self._counted(
                model.run_layer, HiddenStates.numel, 1 / model.num_layers
            )  # type: ignore[method-assign]

    def run(self, one: Contestant, asked: Sequence[Asked], at_once: int) -> None:
        """A turn of its."""
        self._asked += 1
        queries = [
            Query(
                id=f"{self._asked}-{query.name}",
                route=rig.ROUTE,
                prompt_ids=query.prompt_ids,
                max_tokens=self._max_tokens,
                temperature=query.temperature,
                seed=query.seed,
                gamma=None if one.gamma == AS_IS_FASTEST else one.gamma,
                drafter=one.drafter,
                store=False,
            )
            for query in asked
        ]
        computed, forwards, started = self._computed, self._forwards, time.perf_counter()
        answers = self._rig.complete(queries, at_once)
        seconds = time.perf_counter() - started
        if failed := [answer.error for answer in answers if answer.error]:
            raise RuntimeError(f"{len(failed)} queries failed: {failed[0]}")
        one.add(answers, seconds)
        one.computed += self._computed - computed
        one.forwards += self._forwards - forwards

    def answer(
        self, prompts: Sequence[tuple[int, ...]], at_once: int, drafter: DrafterName
    ) -> None:
        """As a service has before: what is learnt from answers is there."""
        told = {"route": rig.ROUTE, "max_tokens": self._max_tokens, "drafter": drafter}
        asked = enumerate(prompts)
        self._rig.complete(
            [
                Query(id=f"before-{i}", prompt_ids=ids, temperature=float(i % 2), seed=i, **told)
                for i, ids in asked
            ],  # type: ignore[arg-type]
            at_once,
        )

    def best(self, drafter: DrafterName, rounds: Sequence[Sequence[Asked]], at_once: int) -> int:
        """How many tokens it should draft."""
        tried = [Contestant(drafter=drafter, gamma=gamma) for gamma in CANDIDATES[drafter]]
        for asked in rounds:
            for one in tried:
                self.run(one, asked, at_once)
        return max(tried, key=lambda one: sum(one.speeds)).gamma

    def _counted(
        self, work: Callable[..., R], tokens: Callable[[Any], int], share: float = 1
    ) -> Callable[..., R]:
        """`share` of the draft's layers, over so many tokens."""

        def counted(rows: Any, fed: Any, *more: Any) -> R:
            self._computed += share * tokens(fed)
            self._forwards += share
            return work(rows, fed, *more)

        return counted


def compare(
    bench: Bench, asked: Sequence[Asked], at_once: int, args: argparse.Namespace
) -> dict[str, Contestant]:
    count = in_turn(args.queries, at_once)
    rounds = [rig.dealt(asked, max(1, count // 2), turn) for turn in range(ROUNDS)]
    found = {PLAIN: Contestant(gamma=0)} | {
        name: Contestant(drafter=name, gamma=bench.best(name, rounds, at_once))
        for name in args.drafters
    }
    everyone = list(found.values())
    for turn in range(args.turns):
        for one in everyone if turn % 2 else everyone[::-1]:
            bench.run(one, rig.dealt(asked, count, turn), at_once)
    return found


def exact_tv(drafter: DrafterName, device: torch.device) -> float:
    """The worst of its shapes and ways to draw, and of several settings, through the functions that serve."""
    cases = [
        Case.of(SHAPES[shape], way, setting, torch.float32)
        for shape, way in ENUMERATED[drafter]
        for setting in SETTINGS
    ]
    return max(distance(on(device, verify), case) for case in cases)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench drafters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with stream/DOMAIN.jsonl (default: ../shared/data, if there)",
    )
    parser.add_argument(
        "--target",
        default="",
        help="folder or hub id (default: beside the data, else the embedded)",
    )
    parser.add_argument(
        "--draft", default="", help="folder or hub id; one that has learnt shows most"
    )
    parser.add_argument("--streams", nargs="+", help="of the data's domains (default: all)")
    parser.add_argument(
        "--drafters",
        nargs="+",
        choices=list(CANDIDATES),
        default=list(CANDIDATES),
        help="beside the chain (default: all)",
    )
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 8], help="sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--queries",
        type=int,
        default=16,
        help=f"of a turn; {A_SEQUENCE} a sequence at least, where several are answered at once (default: %(default)s)",
    )
    parser.add_argument(
        "--answered",
        type=int,
        default=300,
        help="queries of every stream answered before (default: %(default)s)",
    )
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=96, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N (default: cuda where there is one)"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's)")
    args = parser.parse_args()
    started = time.monotonic()
    args.drafters = [name for name in CANDIDATES if name == "chain" or name in args.drafters]
    figures = measure(args)
    figures["seconds"] = round(time.monotonic() - started)
    told = rounded(figures)
    for name, streams in told["drafters"].items():
        for stream, one in streams.items():  # four places would make nothing of it
            one["exact_tv"] = float(f"{figures['drafters'][name][stream]['exact_tv']:.1e}")
    print(json.dumps(told))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    data = args.data or (SHARED / "data" if (SHARED / "data").is_dir() else None)
    pair_folder = SHARED / "models" / "pair"
    if data is not None and pair_folder.is_dir():
        args.target = args.target or str(pair_folder / "target")
        args.draft = args.draft or str(pair_folder / "draft")
    domains = preset("abrupt" if data else "embedded", data, 1).domains
    if unknown := set(args.streams or ()) - set(domains):
        raise ValueError(
            f"--streams: {', '.join(sorted(unknown))} are not among {', '.join(domains)}"
        )
    tokenizer = load_tokenizer(rig.files_of(args))
    held_out = max(ROUNDS, 2 * args.turns) * in_turn(args.queries, max(args.at_once)) // 4
    asked = {
        name: _mixed(exam(name, domain.held_out, tokenizer, LONGEST, held_out, 1))
        for name, domain in domains.items()
        if not args.streams or name in args.streams
    }
    known = [list(one.prompt_ids) for each in asked.values() for one in each]
    pair = Pair(
        rig.files_of(args), known, args.dtype, args.device, args.threads or torch.get_num_threads()
    )
    exact = {name: exact_tv(name, device_of(args.device)) for name in args.drafters}
    found: dict[str, Any] = {name: {} for name in args.drafters}
    _head()
    with rig.rig(
        pair,
        pair.files.draft,
        max(BEFORE, *args.at_once),
        max_tokens=args.max_tokens,
        kept_contexts=0,
    ) as serving:
        bench = Bench(serving, args.max_tokens)
        before: DrafterName = (
            "auto" if "auto" in args.drafters else "chain"
        )  # the choice is learnt, too
        bench.answer(_traffic(domains, tokenizer, args.answered), BEFORE, before)
        for stream, queries in asked.items():
            for at_once in args.at_once:
                turns = compare(bench, queries, at_once, args)
                _table(stream, at_once, turns)
                for name in args.drafters:
                    told = found[name].setdefault(stream, {"exact_tv": exact[name]})
                    suffix = "" if at_once == 1 else f"_{at_once}"
                    told |= {key + suffix: value for key, value in _told(turns, name).items()}
    return {"drafters": found}


def _traffic(domains: Mapping[str, Domain], tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """What these are asked, by turns; nothing of it is held out."""
    sources = [
        Source(prompts(domain.traffic, held_out=False), tokenizer, LONGEST, 1)
        for domain in domains.values()
    ]
    return [source.take() for _ in range(count) for source in sources]


def _mixed(asked: Sequence[Asked]) -> list[Asked]:
    """Sampled and greedy ones by turns."""
    half = len(asked) // 2
    greedy = [replace(one, name=f"{one.name}-greedy") for one in asked[half:]]
    return [one for pair in zip(asked[:half], greedy, strict=True) for one in pair]


def _told(turns: dict[str, Contestant], name: str) -> dict[str, Any]:
    one = turns[name]
    return {
        "gamma": one.gamma,
        "draft_forwards_per_step": one.forwards / one.steps,
        "draft_tokens_per_step": one.computed / one.steps,
        **one.told(turns["chain"], turns[PLAIN]),
    }


def _head() -> None:
    print(
        f"{'stream':10} {'at once':>7} {'drafter':10} {'drafts':>6} {'τ':>5} {'verified':>8} {'forwards':>8}"
        f" {'tokens/s':>9}   over the chain (95 %)   over plain",
        flush=True,
    )


def _table(stream: str, at_once: int, turns: dict[str, Contestant]) -> None:
    for name, one in turns.items():
        told = _told(turns, name)
        chain, plain = told["tokens_per_s_vs_chain"], told["tokens_per_s_vs_plain"]
        drafts = "" if one.gamma == AS_IS_FASTEST else one.gamma
        print(
            f"{stream:10} {at_once:7} {name:10} {drafts:>6} {told['tau']:5.2f} {told['verified_per_token']:8.2f}"
            f" {told['draft_forwards_per_step']:8.2f} {np.median(one.speeds):9.1f}"
            f"   {chain[0]:.2f} ({chain[1]:.2f} to {chain[2]:.2f})     {plain[0]:.2f}",
            flush=True,
        )
