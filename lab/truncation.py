"""`python -m lab truncation`: how much of a distribution has to be logged, in gain kept and bytes per position.

The target answers prompts and is read at every position with its whole vocabulary. The draft learns from the k most
likely tokens and the mass of all others, for several k, and from as many bytes of importance-sampled tokens
(arXiv 2503.16870): drawn from the target's own distribution, each with the share of the draws that it had, which is
unbiased. All are judged on held-out answers against the whole distribution.

Legend: R requests, N positions, V vocabulary, K = top-k.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from lab import rig
from lab.statistics import Floats
from lab.warmup.exam import Marks, difference, examine
from lab.warmup.lessons import add_arguments, learn, loaded, taught_and_held_out
from online.settings import Settings
from online.signals import Signal
from trainer.distill import Recipe

MOST_BYTES = 8 * 2**30  # of whole distributions that are held in memory
NOTHING = -6e4  # log-probability of no probability that float16 can still write
Whole = list[Floats]  # per signal, log p [N, V]


@dataclass(frozen=True)
class Row:
    name: str
    bytes_each: float  # of the target's distribution at one position
    marks: Marks


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab truncation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, prompt_count=400)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument(
        "--sampled", type=int, nargs="+", default=[4, 16, 32], help="distinct tokens, on average"
    )
    parser.add_argument(
        "--seeds", type=int, default=2, help="drafts of each row (default: %(default)s)"
    )
    args, started = parser.parse_args(), time.monotonic()
    pair = rig.pair_of(args)
    taught, judged = taught_and_held_out(args, pair)
    target = loaded(pair.files.target)
    vocab_size = target.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    need = (
        sum(len(s.output_ids) for s in (*taught, *judged)) * vocab_size * 12
    )  # as they are, and sorted
    if need > MOST_BYTES:
        sys.exit(
            f"truncation: whole distributions need {need / 2**30:.1f} GiB; take fewer prompts or shorter answers"
        )
    whole = [whole_distribution(target, signal) for signal in taught]
    exam = [truncated(s, whole_distribution(target, s), vocab_size) for s in judged]
    print(
        f"{len(taught)} answers to learn from, {len(exam)} to judge by, vocabulary {vocab_size}",
        flush=True,
    )

    first = examine(loaded(pair.files.draft), exam)
    recipe, rows = Recipe.of(Settings().recipe), []
    for name, bytes_each, lessons in _variants(args, taught, whole, vocab_size):
        drafts = [
            _taught(pair.files.draft, name, lessons(i), replace(recipe, seed=i))
            for i in range(args.seeds)
        ]
        rows.append(Row(name, bytes_each, Marks.mean([examine(draft, exam) for draft in drafts])))
    print(json.dumps({**_report(first, rows), "seconds": round(time.monotonic() - started)}))


def _variants(
    args: argparse.Namespace, taught: Sequence[Signal], whole: Whole, vocab_size: int
) -> Iterator[tuple[str, float, Callable[[int], list[Signal]]]]:
    """(name, bytes of a position, what is learnt from with a seed); the whole vocabulary first."""
    entry = (
        2 if vocab_size <= 2**16 else 4
    ) + 2  # a token's id, and its log-probability or its count

    def top(k: int, seed: int) -> list[Signal]:
        return [truncated(signal, logp, k) for signal, logp in zip(taught, whole, strict=True)]

    yield "whole", 2.0 * vocab_size, partial(top, vocab_size)
    for k in args.top_k:
        yield f"top {k}", k * entry + 2.0, partial(top, k)
    for distinct in args.sampled:
        draws = draws_for(whole, distinct)
        yield f"{draws} draws", float(distinct * entry), partial(sampled, taught, whole, draws)


@torch.inference_mode()
def whole_distribution(target: nn.Module, signal: Signal) -> Floats:
    """The target's log-probabilities at every position of an answer [N, V]."""
    ids_1T = torch.from_numpy(
        np.concatenate([signal.prompt_ids, signal.output_ids]).astype(np.int64)
    )[None]
    count = len(signal.output_ids)
    logits_NV = target(input_ids=ids_1T, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
    found: Floats = logits_NV.float().log_softmax(-1).numpy()
    return found


def truncated(signal: Signal, logp_NV: Floats, k: int) -> Signal:
    """The signal as it had been logged with the k most likely tokens, in full precision."""
    ids_NK = np.argsort(-logp_NV, axis=1, kind="stable")[:, :k].astype(np.int32)
    logp_NK = np.take_along_axis(logp_NV, ids_NK, 1)
    rest_N = np.clip(1 - np.exp(logp_NK.astype(np.float64)).sum(1), 0, None).astype(np.float32)
    return _along_path(signal, ids_NK, logp_NK, rest_N)


def sampled(signals: Sequence[Signal], whole: Whole, draws: int, seed: int = 0) -> list[Signal]:
    """The signals with draws from each position's distribution in its place: tokens, and their shares of the draws."""
    rng = np.random.default_rng(seed)
    counts = [_counts(logp_NV, draws, rng) for logp_NV in whole]
    widest = max(int((count_NV > 0).sum(1).max()) for count_NV in counts)
    found = []
    for signal, count_NV in zip(signals, counts, strict=True):
        ids_NK = np.argsort(-count_NV, axis=1, kind="stable")[:, :widest].astype(np.int32)
        share_NK = np.take_along_axis(count_NV, ids_NK, 1) / draws
        logp_NK = np.log(np.maximum(share_NK, np.exp(-50.0))).astype(np.float32)
        logp_NK[share_NK == 0] = NOTHING
        found.append(_along_path(signal, ids_NK, logp_NK, np.zeros(len(ids_NK), np.float32)))
    return found


def draws_for(whole: Whole, distinct: int) -> int:
    """The largest number of draws that hit at most `distinct` tokens of a position, on average."""
    p_NV = np.exp(np.concatenate(whole[:: max(1, len(whole) // 50)]).astype(np.float64))

    def hit(draws: int) -> float:
        return float((1 - (1 - np.clip(p_NV, 0, 1)) ** draws).sum(1).mean())

    low, high = 1, 2
    while (
        hit(high) < distinct and high < 2**16
    ):  # a share of more draws does not fit into two bytes
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if hit(middle) <= distinct else (low, middle)
    return low


def _counts(logp_NV: Floats, draws: int, rng: np.random.Generator) -> Floats:
    p_NV = np.exp(logp_NV.astype(np.float64))
    found: Floats = rng.multinomial(draws, p_NV / p_NV.sum(1, keepdims=True)).astype(np.float32)
    return found


def _along_path(signal: Signal, ids_NK: np.ndarray, logp_NK: Floats, rest_N: Floats) -> Signal:
    """A signal of an answer that nobody drafted for: one step a token."""
    count = len(signal.output_ids)
    none, zeros = np.zeros(0, np.int32), np.zeros(count, np.int32)
    return replace(
        signal,
        step_start=np.arange(count, dtype=np.int32),
        step_drafted=zeros,
        step_accepted=zeros,
        step_version=zeros,
        draft_ids=none,
        draft_logp=np.zeros(0, np.float16),
        draft_top_logp=np.zeros((0, ids_NK.shape[1]), np.float16),
        top_ids=ids_NK,
        top_logp=logp_NK,
        rest_mass=rest_N,
    )


def _taught(draft: str, name: str, lessons: Sequence[Signal], recipe: Recipe) -> nn.Module:
    module = loaded(draft)
    learn(f"{name}, seed {recipe.seed}", module, lessons, recipe)
    return module


def gain_kept(first: Marks, whole: Marks, row: Marks) -> list[float]:
    """[share, low, high] of the gain that whole distributions give, of paired differences to it; empty if that is none.

    The gain that they are shares of is taken as it was found.
    """
    gain = float((whole.tokens_R - first.tokens_R).mean())
    return (
        [1 + lost / gain for lost in difference(row.tokens_R, whole.tokens_R).figures]
        if gain > 0
        else []
    )


def _report(first: Marks, rows: Sequence[Row]) -> dict[str, object]:
    whole = rows[0].marks
    print(
        f"\n{'':12} {'bytes/position':>14} {'tokens a step':>14} {'acceptance':>11} {'KL':>6}  gain kept (95 %)"
    )
    print(f"{'first draft':12} {'':14} {first.row}")
    told: dict[str, Mapping[str, float | list[float]]] = {}
    for row in rows:
        kept = [round(share, 4) for share in gain_kept(first, whole, row.marks)]
        share = "{:.3f} ({:.3f} to {:.3f})".format(*kept) if kept else "-"
        print(f"{row.name:12} {row.bytes_each:14.0f} {row.marks.row}  {share}")
        told[row.name] = {
            "bytes": row.bytes_each,
            "tokens_per_step": row.marks.step,
            "gain_kept": kept,
        }
    return {"first": first.step, "rows": told}


if __name__ == "__main__":
    main()
