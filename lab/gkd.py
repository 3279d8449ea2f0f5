"""`python -m lab gkd`: learning from logged distributions, beside TRL's GKDTrainer, which runs the target as it trains.

Both get the same answers of the target to the same prompts, the same draft, the same passes and the service's learning
rate and batch, in batches of like length. TRL trains with the target's whole distribution of its answers (λ = 0, β = 0:
forward KL) and with its own λ and β (half of the steps on the draft's own samples, JSD); once for as many passes, and
once for as many seconds. Logged signals are learnt with rehearsal, which is part of the service's recipe, and without.
Needs TRL: `pip install trl`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lab import rig
from lab.warmup.exam import Marks, difference, examine
from lab.warmup.lessons import add_arguments, learn, loaded, pad_id, taught_and_held_out
from online.settings import Settings
from online.signals import Signal
from trainer.distill import Recipe, factor, steps

WAYS = {"GKD, target's answers": (0.0, 0.0), "GKD, λ and β by default": (0.5, 0.5)}


@dataclass(frozen=True)
class Trained:
    name: str
    seconds: float
    positions: int  # supervised, passes counted
    marks: Marks

    @property
    def ms_each(self) -> float:
        return 1e3 * self.seconds / self.positions


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab gkd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, prompt_count=400)
    args, started = parser.parse_args(), time.monotonic()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl.experimental.gkd  # noqa: F401
    except ImportError as error:
        sys.exit(f"gkd: TRL can't be imported ({error}): pip install trl")
    pair = rig.pair_of(args)
    taught, judged = taught_and_held_out(args, pair)
    recipe, first = Recipe.of(Settings().recipe), examine(loaded(pair.files.draft), judged)

    bare = _logged(
        "logged signals, no rehearsal", pair, taught, judged, replace(recipe, rehearsal=0)
    )
    ours = _logged("logged signals", pair, taught, judged, recipe)
    rows = [ours, bare]
    for name, (share, beta) in WAYS.items():
        train = Gkd(pair, taught, recipe, share, beta, args.max_tokens)
        total = steps([taught], recipe)
        rows.append(train(f"{name}, as many passes", total, judged))
        each_s = rows[-1].seconds / total
        rows.append(train(f"{name}, as many seconds", max(1, round(ours.seconds / each_s)), judged))
    figures = {
        **_report(first, rows),
        "answers": len(taught),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(figures))


def _logged(
    name: str, pair: rig.Pair, taught: Sequence[Signal], judged: Sequence[Signal], recipe: Recipe
) -> Trained:
    module = loaded(pair.files.draft)
    learnt = learn(name, module, taught, recipe)
    return Trained(name, learnt.seconds, learnt.positions, examine(module, judged))


class Gkd:
    """TRL's trainer on the same lessons."""

    def __init__(
        self,
        pair: rig.Pair,
        taught: Sequence[Signal],
        recipe: Recipe,
        share: float,
        beta: float,
        max_tokens: int,
    ) -> None:
        self._pair, self._taught, self._recipe = pair, taught, recipe
        self._share, self._beta, self._max_tokens = share, beta, max_tokens

    def __call__(self, name: str, count: int, judged: Sequence[Signal]) -> Trained:
        """`count` steps from the first draft."""
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        class Counting(GKDTrainer):  # type: ignore[misc]
            """Positions of answers that it makes itself are not known before."""

            positions = 0

            def compute_loss(
                self, model: nn.Module, inputs: dict[str, Tensor], *more: Any, **named: Any
            ) -> Any:
                self.positions += int((inputs["labels"][:, 1:] != -100).sum())
                return super().compute_loss(model, inputs, *more, **named)

        module, recipe = loaded(self._pair.files.draft), self._recipe
        optimizer = torch.optim.AdamW(
            module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda at: factor(at, recipe.warmup_steps, count)
        )
        tokenizer = self._pair.tokenizer
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        with tempfile.TemporaryDirectory() as folder:
            settings = GKDConfig(
                output_dir=folder,
                lmbda=self._share,
                beta=self._beta,
                temperature=1.0,
                max_new_tokens=self._max_tokens,
                max_length=None,
                per_device_train_batch_size=recipe.batch_signals,
                max_steps=count,
                max_grad_norm=recipe.clip_norm,
                seed=recipe.seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                train_sampling_strategy="group_by_length",  # as ours: or half of what it computes would be padding
                length_column_name="length",
            )
            trainer = Counting(
                model=module,
                teacher_model=loaded(self._pair.files.target),
                args=settings,
                data_collator=Collator(pad_id(module)),
                train_dataset=self._dataset(),
                processing_class=tokenizer,
                optimizers=(optimizer, schedule),
            )
            print(f"{name}: {count} steps", flush=True)
            started = time.monotonic()
            trainer.train()
            seconds = time.monotonic() - started
        module.eval()
        return Trained(name, seconds, trainer.positions, examine(module, judged))

    def _dataset(self) -> Any:
        from datasets import Dataset
        from datasets.table import InMemoryTable

        # With a name of its own: the one that would be made for it pickles what some versions of pyarrow can't.
        return Dataset(
            InMemoryTable.from_pylist([_row(signal) for signal in self._taught]),
            fingerprint="lessons",
        )


def _row(signal: Signal) -> dict[str, Any]:
    length = len(signal.prompt_ids) + len(signal.output_ids)
    return {
        "prompt_ids": signal.prompt_ids.tolist(),
        "output_ids": signal.output_ids.tolist(),
        "length": length,
    }


@dataclass(frozen=True)
class Collator:
    """What GKDTrainer takes, from token ids: whole sequences, and prompts alone with their padding in front."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows)
        widest = max(len(row["prompt_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        prompts = torch.full((len(rows), widest), self.pad_id)
        prompt_mask = torch.zeros_like(prompts)
        for i, row in enumerate(rows):
            prompt, answer = torch.tensor(row["prompt_ids"]), torch.tensor(row["output_ids"])
            end = len(prompt) + len(answer)
            ids[i, : len(prompt)], ids[i, len(prompt) : end] = prompt, answer
            mask[i, :end] = 1
            labels[i, len(prompt) : end] = answer
            prompts[i, widest - len(prompt) :], prompt_mask[i, widest - len(prompt) :] = prompt, 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prompts": prompts,
            "prompt_attention_mask": prompt_mask,
        }


def _report(first: Marks, rows: Sequence[Trained]) -> dict[str, object]:
    ours = rows[0]
    print(
        f"\n{'':40} {'seconds':>8} {'positions':>10} {'ms each':>8} {'tokens a step':>14} {'acceptance':>11} {'KL':>6}"
    )
    print(f"{'first draft':40} {'':8} {'':10} {'':8} {first.row}")
    told = {}
    for row in rows:
        print(
            f"{row.name:40} {row.seconds:8.1f} {row.positions:10d} {row.ms_each:8.3f} {row.marks.row}"
        )
        gained, our_gain = _gain(first, row), _gain(first, ours)
        per_gain = (
            row.seconds / gained * our_gain / ours.seconds if min(gained, our_gain) > 0 else None
        )
        told[row.name] = {
            "seconds": round(row.seconds, 1),
            "positions": row.positions,
            "cost_per_position": round(row.ms_each / ours.ms_each, 2),
            "cost_per_gain": per_gain and round(per_gain, 2),
            "tokens_per_step": row.marks.step,
            "ours_better_by": difference(ours.marks.tokens_R, row.marks.tokens_R).figures,
        }
    return {"first": first.step, "rows": told}


def _gain(first: Marks, row: Trained) -> float:
    return float((row.marks.tokens_R - first.tokens_R).mean())


if __name__ == "__main__":
    main()
