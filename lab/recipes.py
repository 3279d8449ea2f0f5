"""`python -m lab recipes`: what recipes learn from the same answers, beside the first one.

The target answers prompts as it would while serving, with the draft drafting γ tokens a step, so that there are
rejected branches to learn from. Every recipe then makes a draft of each seed from those answers; all are judged on the
same held-out answers, and compared in pairs, request by request.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lab import rig
from lab.statistics import Ratio, paired_ratio
from lab.warmup.exam import Marks, examine
from lab.warmup.lessons import EXAM_GAMMA, add_arguments, learn, loaded, taught_and_held_out
from online.settings import Settings
from online.signals import Signal
from trainer.distill import Recipe

USUAL = (
    {},
    {"branch_tokens": 4},
    {"divergence": "kl+acceptance"},
    {"divergence": "acceptance"},
    {"divergence": "jsd"},
    {"divergence": "reverse_kl"},
    {"divergence": "tvd"},
    {"divergence": "tvd++"},
    {"follow_temperature": True},
    {"selected_share": 0.4},
    {"rehearsal": 0},
)


@dataclass(frozen=True)
class Row:
    change: dict[str, Any]
    seconds: float  # of training, mean over seeds
    marks: list[Marks]  # by seed

    @property
    def tokens(self) -> np.ndarray:
        """Tokens per step of every request, mean over seeds: a request's drafts are no requests of their own."""
        return np.mean([marks.tokens_R for marks in self.marks], axis=0)

    def by_seed(self, other: "Row") -> list[float]:
        means = ([float(marks.tokens_R.mean()) for marks in row.marks] for row in (self, other))
        return [own / others for own, others in zip(*means, strict=True)]

    def over(self, other: "Row") -> Ratio:
        ones = np.ones(len(self.tokens))
        return paired_ratio((other.tokens, ones), (self.tokens, ones))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, prompt_count=400)
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="JSON",
        help="fields that differ from the configured recipe; may be repeated: the others are compared with the first",
    )
    parser.add_argument(
        "--gamma",
        type=int,
        default=EXAM_GAMMA,
        help="drafted while answering (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="drafts of each recipe (default: %(default)s)"
    )
    args, started = parser.parse_args(), time.monotonic()
    changes = [_change(text) for text in args.recipe] if args.recipe else list(USUAL)
    pair = rig.pair_of(args)
    taught, judged = taught_and_held_out(args, pair, gamma=args.gamma)
    first = examine(loaded(pair.files.draft), judged)
    rows = [_row(pair.files.draft, change, taught, judged, args.seeds) for change in changes]
    figures = {**_report(first, rows, judged), "answers": len(taught), "seeds": args.seeds}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - started)}))


def _change(text: str) -> dict[str, Any]:
    try:
        change: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--recipe {text}: no JSON: {error}") from error
    Recipe.of(change)
    return change


def _row(
    draft: str,
    change: dict[str, Any],
    taught: Sequence[Signal],
    judged: Sequence[Signal],
    seeds: int,
) -> Row:
    recipe = Recipe.of({**Settings().recipe, **change})
    marks, seconds = [], []
    for seed in range(seeds):
        module = loaded(draft)
        told = learn(f"{_name(change)}, seed {seed}", module, taught, replace(recipe, seed=seed))
        marks.append(examine(module, judged))
        seconds.append(told.seconds)
    return Row(change, float(np.mean(seconds)), marks)


def _name(change: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in change.items()) or "as configured"


def _report(first: Marks, rows: Sequence[Row], judged: Sequence[Signal]) -> dict[str, object]:
    sampled_R = np.array([signal.temperature > 0 for signal in judged])
    print(
        f"\n{'recipe':34} {'seconds':>8} {'sampled τ':>10} {'greedy τ':>9} {'acceptance':>11}  ratio (95 %), by seed"
    )
    print(f"{'first draft':34} {'':8} {_line(first, sampled_R)}")
    told = []
    for row in rows:
        marks, ratio = Marks.mean(row.marks), row.over(rows[0])
        seeds = [round(each, 3) for each in row.by_seed(rows[0])]
        share = (
            ""
            if row is rows[0]
            else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) {seeds}"
        )
        print(f"{_name(row.change):34} {row.seconds:8.1f} {_line(marks, sampled_R)}  {share}")
        told.append(
            {
                "recipe": row.change,
                "seconds": round(row.seconds, 1),
                "tokens_per_step": marks.step,
                "over_first_recipe": [
                    round(value, 4) for value in (ratio.value, ratio.low, ratio.high)
                ],
                "by_seed": seeds,
            }
        )
    return {"first_draft": first.step, "recipes": told}


def _line(marks: Marks, sampled_R: np.ndarray) -> str:
    tokens = [
        marks.tokens_R[of_R].mean() if of_R.any() else np.nan for of_R in (sampled_R, ~sampled_R)
    ]
    return f"{tokens[0]:10.3f} {tokens[1]:9.3f} {marks.acceptance_R.mean():11.3f}"


if __name__ == "__main__":
    main()
