"""`python -m lab distil`: warms a draft up on prompts, offline, by the path that the service takes while it serves.

The engine answers the prompts, its recorder logs the target's distributions, and the trainer's recipe distils the draft
on them. The result is a model folder: a first draft for the service, or a contestant for the benchmarks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import transformers

from lab import rig
from online.messages import Query
from online.signals import Signal, decode
from trainer.batches import held_out, usable
from trainer.distill import Recipe, distill
from trainer.gate import judge

AT_ONCE = 32  # queries answered together


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab distil", description=__doc__)
    rig.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for the distilled draft")
    parser.add_argument("--queries", type=int, default=1000, help="prompts answered and learnt from")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    args.prompt_count = args.queries
    pair = rig.pair_of(args)
    started = time.monotonic()
    signals = answer(pair, args.max_tokens)
    lessons, exam = [s for s in signals if not held_out(s)], [s for s in signals if held_out(s)]
    print(
        f"{len(signals)} answers in {time.monotonic() - started:.0f} s; learning from {len(lessons)} of them",
        flush=True,
    )

    torch.set_num_threads(pair.threads)
    load = transformers.AutoModelForCausalLM.from_pretrained
    module, before = load(pair.files.draft, dtype=torch.float32), load(pair.files.draft, dtype=torch.float32)
    stored = transformers.AutoConfig.from_pretrained(pair.files.draft).dtype or torch.float32
    recipe = Recipe(epochs=args.epochs, learning_rate=args.learning_rate)
    pad_id = int(module.config.pad_token_id or 0)
    distilled = distill(module, lessons, recipe, pad_id, _Progress(args.epochs * len(lessons) // recipe.batch_signals))
    module.to(stored).save_pretrained(args.out)
    pair.tokenizer.save_pretrained(args.out)
    after = load(args.out, dtype=torch.float32)
    report = judge(before, after, exam, gamma=4, pad_id=pad_id)
    print(f"held-out requests: {report.reason}")
    figures = {
        "out": str(args.out),
        "answers": len(signals),
        "positions": distilled.positions,
        "train_s": round(distilled.seconds, 1),
        "tokens_per_step_before": round(report.active_tokens_per_step, 3),
        "tokens_per_step_after": round(report.candidate_tokens_per_step, 3),
        "acceptance_before": round(report.active_acceptance, 3),
        "acceptance_after": round(report.candidate_acceptance, 3),
    }
    print(json.dumps(figures))


def answer(pair: rig.Pair, max_tokens: int, gamma: int | None = 0) -> list[Signal]:
    """Every other prompt greedy, the others at temperature 1: both kinds of traffic will be drafted for."""
    with rig.rig(pair, pair.files.draft, AT_ONCE, max_tokens=max_tokens) as serving:
        for at in range(0, len(pair.prompts), 8 * AT_ONCE):
            group = list(enumerate(pair.prompts))[at : at + 8 * AT_ONCE]
            serving.complete(
                [Query(f"q{i}", rig.ROUTE, tuple(p), max_tokens, float(i % 2), seed=i, gamma=gamma) for i, p in group]
            )
            print(f"answered {min(at + 8 * AT_ONCE, len(pair.prompts))} of {len(pair.prompts)}", flush=True)
        serving.recorder.stop(60)
        records = [entry.record for entry in serving.buffer.before(rig.ROUTE, "99999999999999-0", len(pair.prompts))]
        vocab_size = serving.engine.batch.target.vocab_size
    return [signal for signal in map(decode, records) if usable(signal, vocab_size)]


class _Progress:
    def __init__(self, total: int) -> None:
        self._total, self._done, self._started = total, 0, time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        if self._done % max(1, self._total // 10) == 0:
            spent = time.monotonic() - self._started
            print(f"step {self._done} of {self._total}, {spent:.0f} s", flush=True)
