"""The demo's result: the same queries under the first and the learnt draft."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.output import table
from lab.statistics import Estimate, paired_ratio
from lab.traffic import Served

WHEN = ("before", "after")
KINDS = {"": "all", "sampled_": "sampled", "greedy_": "greedy"}  # prefix of figures → kind


@dataclass(frozen=True)
class HeldOut:
    """Answers to the held-out queries under one draft, each query sampled and greedy."""

    sampled: dict[int, Served]
    greedy: dict[int, Served]

    @property
    def all(self) -> dict[tuple[str, int], Served]:
        sides = {"sampled": self.sampled, "greedy": self.greedy}
        return {(name, i): answer for name, side in sides.items() for i, answer in side.items()}

    def of(self, kind: str) -> Mapping[Any, Served]:
        found: Mapping[Any, Served] = getattr(self, kind)
        return found


def tokens_per_step(served: Sequence[Served]) -> float:
    return sum(a.tokens for a in served) / sum(a.steps for a in served)


def mean_overlap(served: Sequence[Served]) -> float:
    return float(np.mean([a.overlap for a in served if a.overlap is not None]))


def gained(before: HeldOut, after: HeldOut) -> dict[str, Any]:
    """τ, acceptance and the paired ratio of τ by kind of query; how many greedy answers agree."""
    figures: dict[str, Any] = {}
    for prefix, kind in KINDS.items():
        found = _compare(before.of(kind), after.of(kind))
        figures |= {prefix + name: value for name, value in found.items()}
    pairs = before.greedy.keys() & after.greedy.keys()
    same = sum(before.greedy[i].text == after.greedy[i].text for i in pairs)
    return {**figures, "greedy_same": same, "greedy_compared": len(pairs)}


def _compare(before: Mapping[Any, Served], after: Mapping[Any, Served]) -> dict[str, float]:
    pairs = sorted(before.keys() & after.keys())  # queries that both drafts answered
    sides = [_tokens_and_steps([side[i] for i in pairs]) for side in (before, after)]
    ratio = paired_ratio(*sides)
    old, new = list(before.values()), list(after.values())
    return {
        "tau_before": tokens_per_step(old),
        "tau_after": tokens_per_step(new),
        "tau_ratio": ratio.value,
        "tau_ratio_low": ratio.low,
        "tau_ratio_high": ratio.high,
        "acceptance_before": mean_overlap(old),
        "acceptance_after": mean_overlap(new),
    }


def _tokens_and_steps(served: Sequence[Served]) -> list[np.ndarray]:
    return [np.array([getattr(a, name) for a in served], float) for name in ("tokens", "steps")]


def show_versions(
    activations: Sequence[Mapping[str, Any]], versions: Mapping[int, Mapping[str, Any]]
) -> None:
    rows = []
    for activation in activations:
        number = activation["to_version"]
        window = versions[number]["window"]
        learnt = f"{window['trained_on']} signals" if window else "-"
        rows.append([number, activation["kind"], learnt, activation["reason"]])
    table(["version", "activation", "learnt from", "reason"], rows, "versions that served")


def show_gain(figures: Mapping[str, Any]) -> None:
    rows = []
    for prefix, kind in KINDS.items():
        ratio = Estimate(*(figures[f"{prefix}tau_ratio{end}"] for end in ("", "_low", "_high")))
        tau = [f"{figures[f'{prefix}tau_{when}']:.2f}" for when in WHEN]
        acceptance = [f"{figures[f'{prefix}acceptance_{when}']:.3f}" for when in WHEN]
        rows.append([kind, *tau, ratio, *acceptance])
    same, compared = figures["greedy_same"], figures["greedy_compared"]
    head = ["queries", "τ before", "τ after", "ratio (95 %)", "acceptance before", "after"]
    title = f"held-out queries of {figures['package']}, {compared} of each kind"
    table(head, rows, f"{title}; τ: tokens per target forward, acceptance: Σ min(p, q)")
    print(f"greedy answers the same before and after: {same} of {compared}")
    print(
        f"{figures['requests']} requests, {figures['failed_requests']} failed,"
        f" {figures['swaps']} swaps, {figures['train_s']:.0f} s of training"
    )
    print(f"chart: {figures['chart']}")
