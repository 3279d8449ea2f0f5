"""What the demo gained: the same queries under the first and the learnt draft, as figures and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lab.statistics import Ratio, paired_ratio
from lab.traffic import Served


@dataclass(frozen=True)
class Examined:
    """The held-out queries' answers under one draft: every query once sampled and once greedy."""

    sampled: dict[int, Served]
    greedy: dict[int, Served]

    @property
    def all(self) -> dict[tuple[str, int], Served]:
        sides = {"sampled": self.sampled, "greedy": self.greedy}
        return {(name, i): answer for name, side in sides.items() for i, answer in side.items()}


def tokens_per_step(served: Sequence[Served]) -> float:
    return sum(a.tokens for a in served) / sum(a.steps for a in served)


def mean_overlap(served: Sequence[Served]) -> float:
    return float(np.mean([a.overlap for a in served if a.overlap is not None]))


def tau_ratio(before: Mapping[Any, Served], after: Mapping[Any, Served]) -> Ratio:
    """τ after ÷ before over the queries that both answered."""
    pairs = sorted(before.keys() & after.keys())
    sides = [
        tuple(
            np.array([getattr(side[i], name) for i in pairs], float) for name in ("tokens", "steps")
        )
        for side in (before, after)
    ]
    return paired_ratio(sides[0], sides[1])  # type: ignore[arg-type]


def compare(
    name: str, before: Mapping[Any, Served], after: Mapping[Any, Served]
) -> dict[str, float]:
    """τ, acceptance and the paired ratio of one kind of queries, as `{name}tau_before` and so on."""
    ratio = tau_ratio(before, after)
    old, new = list(before.values()), list(after.values())
    found = {
        "tau_before": tokens_per_step(old),
        "tau_after": tokens_per_step(new),
        "tau_ratio": ratio.value,
        "tau_ratio_low": ratio.low,
        "tau_ratio_high": ratio.high,
        "acceptance_before": mean_overlap(old),
        "acceptance_after": mean_overlap(new),
    }
    return {name + key: value for key, value in found.items()}


def gained(before: Examined, after: Examined) -> dict[str, Any]:
    pairs = before.greedy.keys() & after.greedy.keys()
    return {
        **compare("", before.all, after.all),
        **compare("sampled_", before.sampled, after.sampled),
        **compare("greedy_", before.greedy, after.greedy),
        "greedy_same": sum(before.greedy[i].text == after.greedy[i].text for i in pairs),
        "greedy_compared": len(pairs),
    }


def report(
    figures: Mapping[str, Any],
    activations: Sequence[Mapping[str, Any]],
    versions: Mapping[int, Mapping[str, Any]],
) -> None:
    print("\nversions that served")
    for activation in activations:
        window = versions[activation["to_version"]]["window"]
        learnt = f"{window['trained_on']} signals" if window else "-"
        line = f"  {activation['to_version']:3d}  {activation['kind']:13} learnt from {learnt:12}"
        print(f"{line} {activation['reason']}")
    print(f"\nheld-out queries of {figures['package']}, {figures['greedy_compared']} of each kind")
    print(f"  {'':42}{'first draft':>12}{'learnt':>9}   ratio (95 %)")
    for name, kind in (("", "all"), ("sampled_", "sampled"), ("greedy_", "greedy")):
        low, high = figures[f"{name}tau_ratio_low"], figures[f"{name}tau_ratio_high"]
        ratio = f"{figures[f'{name}tau_ratio']:.2f} ({low:.2f} to {high:.2f})"
        _row(f"tokens per target forward τ, {kind}", figures, f"{name}tau", 2, ratio)
    for name, kind in (("", "all"), ("sampled_", "sampled"), ("greedy_", "greedy")):
        _row(f"acceptance rate Σ min(p, q), {kind}", figures, f"{name}acceptance", 3)
    print(
        f"  greedy answers the same before and after: {figures['greedy_same']} of {figures['greedy_compared']}\n"
        f"\n{figures['requests']} requests, {figures['failed_requests']} failed, {figures['swaps']} swaps, "
        f"{figures['train_s']:.0f} s of training, {figures['seconds']:.0f} s in all\nchart: {figures['chart']}"
    )


def _row(title: str, figures: Mapping[str, Any], key: str, digits: int, ratio: str = "") -> None:
    before, after = figures[f"{key}_before"], figures[f"{key}_after"]
    print(f"  {title:42}{before:12.{digits}f}{after:9.{digits}f}   {ratio}".rstrip())
